"""Leave no trace: what a teleport may disturb is put back as it was."""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hf_teleport.distributed import ALONE, Ranks
from hf_teleport.storage import WorkingWeights, working_weights


@contextmanager
def isolated(model: nn.Module, optimizer: Any, ranks: Ranks, on_shards: bool = False) -> Iterator[WorkingWeights]:
    """Inside, nothing leaves a trace but moved weights. Yields the weights to work on.

    Args:
        on_shards: weights that FSDP2 shards stay so, if they can.
    """
    with ExitStack() as stack:

        def enter() -> WorkingWeights:
            weights = stack.enter_context(working_weights(model, optimizer, ranks, on_shards))
            for around in (preserved_rng(), evaluation_mode(model), full_precision(model), plain_execution()):
                stack.enter_context(around)
            return weights

        yield ranks.together(enter)


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
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # `torch.manual_seed` also notes a stack trace for every backend that is not there: milliseconds, before each forward.
        torch.default_generator.manual_seed(seed)


def own_copy(source: Any) -> Any:
    """A data set or collator whose random generators are copies: drawing from them does not move those of training."""
    own = copy.copy(source)
    for name, value in list(getattr(own, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            setattr(own, name, value.clone_state())
        elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
            setattr(own, name, copy.deepcopy(value))
    return own


# Where TRL's trainers gather what `compute_loss` measures, by mode and name, until `log` averages and clears it.
_NOTEBOOKS = ("_metrics", "_stored_metrics")


@contextmanager
def unnoted(trainer: Any) -> Iterator[None]:
    """What a trainer's `compute_loss` and `log` note and clear is not that of training: they get empty notebooks meanwhile."""
    kept = {name: value for name, value in vars(trainer).items() if name in _NOTEBOOKS}
    vars(trainer).update({name: defaultdict(lambda: defaultdict(list)) for name in kept})
    try:
        yield
    finally:
        vars(trainer).update(kept)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and its own mode after; buffers too are as before.

    Dropout and layer drop are off, and batch norm uses its running statistics and leaves them alone: the function
    whose loss is held fixed is the one that evaluation sees.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        yield
    finally:
        # Through the methods, for modules that do more than set a flag, and then each module's own flag.
        model.train()
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, saved in buffers:
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)
            module._buffers[name] = buffer


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """TF32 is off, and autocast, whether it is around or wrapped into the model's forward by Accelerate.

    Projections and changes of basis need every digit.
    """
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    precision = torch.get_float32_matmul_precision()
    kinds = {parameter.device.type for parameter in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")  # no TF32
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if wrapped is not None and original is not None:
            model.__dict__["forward"] = original
            stack.callback(model.__dict__.__setitem__, "forward", wrapped)
        yield


@contextmanager
def plain_execution() -> Iterator[None]:
    """What is compiled runs as it was written, and reentrant checkpoints keep what they would compute again.

    Neither can be followed: a compiled part hides its operations, and a reentrant checkpoint gives no gradients to
    `torch.autograd.grad`. (Layers of Transformers checkpoint only in train mode.)
    """
    kept = SimpleNamespace(apply=lambda function, preserve, *args: function(*args))
    stance = torch.compiler.set_stance("force_eager")
    with stance, mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", kept):
        yield


def forget_caches(model: nn.Module) -> None:
    """Pass through train mode: a module that caches in eval mode what depends on its weights (LeViT's biases) drops it then."""
    model.train()
    model.eval()


class Snapshot:
    """A copy of parameters to return to, and of what an optimizer keeps for them.

    Args:
        state: the optimizer's `state`, if it is to be restored too.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], state: dict[Any, Any] | None = None):
        self._saved = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._state = state
        self._kept = {} if state is None else {p: copy.deepcopy(state[p]) for p, _ in self._saved if p in state}

    def restore(self) -> None:
        """Put the copied values back, bit for bit."""
        with torch.no_grad():
            for parameter, saved in self._saved:
                parameter.copy_(saved)
        for parameter, kept in self._kept.items():
            # Without new memory, which may be why this is called.
            now = self._state.setdefault(parameter, {})  # type: ignore[union-attr]
            for name, value in kept.items():
                if isinstance(value, Tensor) and isinstance(now.get(name), Tensor) and now[name].shape == value.shape:
                    now[name].detach().copy_(value)
                else:
                    now[name] = value

    def halve(self) -> None:
        """Take the parameters half the way back."""
        with torch.no_grad():
            for parameter, saved in self._saved:
                parameter.lerp_(saved, 0.5)

    def moved(self) -> dict[nn.Parameter, Tensor]:
        """How far each parameter is from its copy."""
        return {parameter: parameter.detach() - saved for parameter, saved in self._saved}

    def changed(self, ranks: Ranks = ALONE) -> dict[nn.Parameter, float | None]:
        """The parameters W that differ from their copy W0, and by how much: ||W - W0|| / ||W0||, None if that is not finite.

        One after the other, so that no second copy of all of them is held.

        Args:
            ranks: the processes that hold these parameters, whole or in parts.
        """
        found = ranks.together(lambda: [_difference(parameter, saved) for parameter, saved in self._saved])
        if ranks.shards is not None:
            squares = iter(ranks.shards.total([value * value for each in found for value in each]))
            found = [(each, next(squares) ** 0.5, next(squares) ** 0.5) for each in squares]
        return {
            parameter: _share(distance, length)
            for (parameter, _), (differs, distance, length) in zip(self._saved, found, strict=True)
            if differs
        }


@torch.no_grad()
def _difference(parameter: Tensor, saved: Tensor) -> tuple[float, float, float]:
    """Whether they differ, by how much, and the norm of the copy, which is also wanted if other parts of the weight differ."""
    differs = not torch.equal(parameter, saved)
    distance = float(torch.linalg.vector_norm(parameter - saved)) if differs else 0.0
    return float(differs), distance, float(torch.linalg.vector_norm(saved))


def _share(distance: float, length: float) -> float | None:
    relative = distance / length if length else math.inf
    return relative if math.isfinite(relative) else None
