"""Leave no trace: what a teleport may disturb is put back as it was."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Random states of Python, NumPy, torch and every CUDA device are the same after as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; inside `preserved_rng` only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and its own mode after; buffers too are as before.

    Dropout and layer drop are off, and batch norm uses its running statistics and leaves them alone: the function
    whose loss is held fixed is the one that evaluation sees.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        forget_caches(model)
        for module, mode in modes.items():
            module.training = mode
        for buffer, saved in buffers:
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)


def forget_caches(model: nn.Module) -> None:
    """Pass through train mode: a module that caches in eval mode what depends on its weights (LeViT's biases) drops it then."""
    model.train()
    model.eval()


@contextmanager
def shifted(parameters: Iterable[nn.Parameter], directions: Iterable[Tensor | None], epsilon: float) -> Iterator[None]:
    """The parameters stand at `W + epsilon u` inside, and are bit for bit what they were after."""
    originals = []
    try:
        for parameter, direction in zip(parameters, directions, strict=True):
            if direction is not None:
                originals.append((parameter, parameter.data))
                parameter.data = parameter.data + epsilon * direction
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


class Snapshot:
    """A copy of parameters to return to."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._saved = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def restore(self) -> None:
        """Put the copied values back, bit for bit."""
        with torch.no_grad():
            for parameter, saved in self._saved:
                parameter.copy_(saved)

    def changed(self) -> set[nn.Parameter]:
        """The parameters that differ from their copy."""
        return {parameter for parameter, saved in self._saved if not torch.equal(parameter, saved)}
