"""Isolate an event from training: restore random states, modes, buffers and caches, so that only the weights change."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import getclosurevars
from itertools import islice
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.storage import working_weights
from hf_teleport.weights.whole import Weights


@contextmanager
def isolated(model: nn.Module, state: MutableMapping[Any, Any], ranks: Ranks, on_shards: bool = False) -> Iterator[Weights]:
    """Inside, all changes except to weights are undone at the end. Yields the weights to work on.

    Args:
        state: the optimizer's state of each parameter.
        ranks: the processes that work on the weights.
        on_shards: whether weights that FSDP2 shards stay sharded, if possible.
    """
    with ExitStack() as stack:

        def enter() -> Weights:
            weights = stack.enter_context(working_weights(model, state, ranks, on_shards))
            for around in (preserved_rng(), evaluation_mode(model), full_precision(model), plain_execution()):
                stack.enter_context(around)
            return weights

        yield ranks.together(enter)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch and every CUDA device at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. Only for use inside `preserved_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # `torch.manual_seed` records a stack trace for every absent backend, which takes milliseconds before each forward.
        torch.default_generator.manual_seed(seed)


def own_copy(source: Any) -> Any:
    """Copy a data set, collator or sampler, so that reading it does not advance its position or counters for training.

    Returns the source itself if its class can't be copied.
    """
    try:
        return copy.copy(source)
    except Exception:
        return source


@contextmanager
def preserved_generators(*sources: Any) -> Iterator[None]:
    """Restore the states of all random generators in these objects and their parts at the end."""
    put_back = [_rewinding(generator) for generator in _generators(sources)]
    try:
        yield
    finally:
        for rewind in put_back:
            rewind()


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

# The search for generators goes this deep, and looks at this many elements of a container, which may have a million rows.
_DEPTH, _FEW = 7, 16


def _generators(sources: Iterable[Any]) -> list[Any]:
    """The generators inside objects, nearest first."""
    seen: dict[int, Any] = {}
    level = list(sources)
    for _ in range(_DEPTH + 1):
        new = [part for part in level if not isinstance(part, (type, ModuleType, nn.Module, Tensor, np.ndarray))]
        new = list({id(part): part for part in new if id(part) not in seen}.values())
        seen |= {id(part): part for part in new}
        level = [inner for part in new if not isinstance(part, _GENERATORS) for inner in _parts(part)]
    return [found for found in seen.values() if isinstance(found, _GENERATORS)]


def _parts(source: Any) -> list[Any]:
    if isinstance(source, (list, tuple)):
        return list(source[:_FEW])
    if isinstance(source, dict):
        return list(islice(source.values(), _FEW))
    if isinstance(source, partial):
        return [source.func, *source.args, *source.keywords.values()]
    if isinstance(source, MethodType):
        return [source.__self__]
    if isinstance(source, FunctionType):
        return list(getclosurevars(source).nonlocals.values())
    return list(getattr(source, "__dict__", {}).values())


def _rewinding(generator: Any) -> Callable[[], None]:
    """A function that restores a generator's present state."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


# Data attributes of a trainer, which `unnoted` does not copy: a list of a million rows takes long.
_DATA = ("train_dataset", "eval_dataset", "_own_teleport_dataset")

# `unnoted` copies tensors of at most this many elements, such as a sum of losses.
_SMALL = 2**20


@contextmanager
def unnoted(trainer: Any) -> Iterator[None]:
    """Discard what a trainer's own code logs, or stores in the trainer's attributes, during an event.

    Inside, `log` does nothing and no callback is called. The numbers, containers and small tensors among the trainer's attributes
    are copies. (TRL's trainers gather values in such containers, and average them in their next `log`.)
    """
    handler, history, kept = trainer.callback_handler, trainer.state.log_history, dict(vars(trainer))
    callbacks, rows = handler.callbacks, len(history)
    notes = {name: _own_notes(value) for name, value in kept.items() if name not in _DATA}
    vars(trainer).update(notes, log=lambda *args, **kwargs: None)
    handler.callbacks = []
    try:
        yield
    finally:
        handler.callbacks = callbacks
        del history[rows:]
        # Remove new attributes of these types. Others stay, such as a teacher model that was loaded at its first use.
        new = [name for name, value in vars(trainer).items() if name not in kept and isinstance(value, _NOTES)]
        for name in {"log", *new}:
            vars(trainer).pop(name, None)
        vars(trainer).update(kept)


_CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict, Counter)
_NOTES = (int, float, str, Tensor, *_CONTAINERS)


def _own_notes(value: Any, depth: int = 3) -> Any:
    """A copy of nested containers and the small tensors in them. Everything else is shared."""
    if isinstance(value, Tensor):
        return value if value.requires_grad or value.numel() > _SMALL else value.clone()
    if not depth or type(value) not in _CONTAINERS:
        return value
    own = copy.copy(value)
    if isinstance(own, (dict, list)):
        for place in own if isinstance(own, dict) else range(len(own)):
            own[place] = _own_notes(value[place], depth - 1)
    return own


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode. At the end modes and buffers are restored.

    Dropout and layer drop are off. Batch norm uses its running statistics, and does not update them. So a teleport keeps the loss
    of the function that evaluation sees.
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
        # First by `train`, because some modules override it to do more than set a flag. Then set each module's own flag.
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
    """Inside, TF32 and autocast are off, also the autocast that Accelerate wraps around the model's forward.

    Projections and changes of basis need full precision.
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
    """Inside, compiled parts run uncompiled, and reentrant activation checkpointing is off.

    A compiled part hides its operations from the trace, and reentrant checkpointing does not work with `torch.autograd.grad`.
    (Layers of Transformers checkpoint only in train mode.)
    """
    kept = SimpleNamespace(apply=lambda function, preserve, *args: function(*args))
    stance = torch.compiler.set_stance("force_eager")
    with stance, mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", kept):
        yield


def forget_caches(model: nn.Module) -> None:
    """Switch to train mode and back. A module that caches values of its weights in eval mode (LeViT's biases) then drops them."""
    model.train()
    model.eval()
