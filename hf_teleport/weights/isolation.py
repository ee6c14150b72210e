"""Leave no trace: what a teleport may disturb is put back as it was."""

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
    """Inside, nothing leaves a trace but moved weights. Yields the weights to work on.

    Args:
        state: what the optimizer keeps for each parameter.
        on_shards: weights that FSDP2 shards stay so, if they can.
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
    """A copy of a data set, collator or sampler, so that a place or a count that it keeps does not move on for training.

    The source itself where its class forbids copies, or hands the questions of `copy` on to something else.
    """
    try:
        return copy.copy(source)
    except Exception:
        return source


@contextmanager
def preserved_generators(*sources: Any) -> Iterator[None]:
    """The random generators that these objects hold, or their parts do, are in the same state after as before."""
    put_back = [_rewinding(generator) for generator in _generators(sources)]
    try:
        yield
    finally:
        for rewind in put_back:
            rewind()


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

# How deep to look for generators, and at how many elements of a container: a data set may be a list of a million rows.
_DEPTH, _FEW = 7, 16


def _generators(sources: Iterable[Any]) -> list[Any]:
    """Those that objects hold, nearest first."""
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
    """What brings a generator back to where it is now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


# Attributes of a trainer that are data and no notes: copying a list of a million rows takes long.
_DATA = ("train_dataset", "eval_dataset", "_own_teleport_dataset")

# Elements of a tensor up to which it is taken for a note, such as a sum of losses.
_SMALL = 2**20


@contextmanager
def unnoted(trainer: Any) -> Iterator[None]:
    """What a trainer's own code notes on the trainer, or logs, is gone afterwards.

    Inside, `log` does nothing, no callback hears of anything, and the numbers, containers and small tensors among the trainer's
    attributes are copies. (TRL's trainers gather in such containers what their next `log` averages.)
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
        # An attribute that is new stays if it is no note: a teacher, for instance, that was loaded at its first use.
        new = [name for name, value in vars(trainer).items() if name not in kept and isinstance(value, _NOTES)]
        for name in {"log", *new}:
            vars(trainer).pop(name, None)
        vars(trainer).update(kept)


_CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict, Counter)
_NOTES = (int, float, str, Tensor, *_CONTAINERS)


def _own_notes(value: Any, depth: int = 3) -> Any:
    """A copy of containers in containers, and of the small tensors in them; whatever else is shared."""
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
