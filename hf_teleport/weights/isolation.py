"""Leave no trace: what a teleport may disturb is put back as it was."""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.storage import WorkingWeights, working_weights


@contextmanager
def isolated(
    model: nn.Module, state: MutableMapping[Any, Any], ranks: Ranks, on_shards: bool = False
) -> Iterator[WorkingWeights]:
    """Inside, nothing leaves a trace but moved weights. Yields the weights to work on.

    Args:
        state: what the optimizer keeps for each parameter.
        on_shards: weights that FSDP2 shards stay so, if they can.
    """
    with ExitStack() as stack:

        def enter() -> WorkingWeights:
            weights = stack.enter_context(working_weights(model, state, ranks, on_shards))
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
