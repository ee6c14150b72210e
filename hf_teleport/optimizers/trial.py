"""New optimizers of the kind of a given one: for one parameter, with the options of its group, as if training began."""

import gc
import inspect
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_teleport.optimizers.parts import is_count
from hf_teleport.weights.copies import copied, is_wrapper, tensors_in
from hf_teleport.weights.isolation import seed_everything

Group = dict[str, Any]


def anew(part: Any, group: Group, *parameters: nn.Parameter) -> Any:
    """A new optimizer like `part` for these parameters alone, with the options of a group (`at_start`)."""
    return _like(part, [{**copied(_without(group)), "params": list(parameters)}])


def renewed(part: Any) -> Any:
    """A new optimizer like `part` for all of its parameters, as if training began: what depends on their order is as it was."""
    return _like(part, [{**copied(_without(at_start(part, group))), "params": group["params"]} for group in part.param_groups])


def _like(part: Any, groups: list[Group]) -> Any:
    kind = type(part)
    known = {**vars(part), **part.defaults}
    takes = list(inspect.signature(kind).parameters)[1:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said when the real one was made
            return kind(groups, **{name: copied(known[name]) for name in takes if name in known})
    except Exception:  # one that needs more than it tells
        trial = shell(part)
        trial.state = defaultdict(dict)
        trial.param_groups = groups
        return trial


def at_start(part: Any, group: Group) -> Group:
    """A group's options without what steps change in it: counts, and what else is kept for all of its parameters."""
    varying = counts(part, group)
    return {name: value for name, value in group.items() if name not in varying}


def shell(optimizer: Any) -> Any:
    """An optimizer of the same kind and settings, without parameters, state and hooks."""
    own: Any = object.__new__(type(optimizer))
    # A scheduler puts a counting `step` on the object.
    own.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    for hooks in [name for name in own.__dict__ if name.startswith("_optimizer_step_")]:
        setattr(own, hooks, OrderedDict())
    return own


def counts(part: Any, group: Group) -> set[str]:
    """The names of a group's entries that steps change."""
    own = ones(group)
    trial = anew(part, group, own)
    before = copied(_without(trial.param_groups[0]))
    _steps(trial, own, [own.detach() * i for i in (1, 2, 3)])
    after = _without(trial.param_groups[0])
    return {name for name, value in after.items() if name != "lr" and (name not in before or _differ(before[name], value))}


def keeps_own_counts(part: Any, group: Group) -> bool:
    """Whether an optimizer counts beside its groups and the states of its parameters, where a reset of some can't reach."""
    own = ones(group)
    trial = anew(part, at_start(part, group), own)
    before = {name: copied(value) for name, value in vars(trial).items() if _is_number(value)}
    _steps(trial, own, [own.detach() * i for i in (1, 2, 3)])
    moved = any(_differ(value, vars(trial)[name]) for name, value in before.items())
    return moved or any(not isinstance(key, Tensor) for key in trial.state)


def ones(group: Group) -> nn.Parameter:
    """A small parameter of ones with as many axes as the first of a group; of an empty group (Trainer makes some): with two."""
    like = group["params"][0] if group["params"] else torch.empty(0, 0)
    return nn.Parameter(torch.ones([4, 3, 2, 2][: max(like.dim(), 1)], device=like.device, dtype=like.dtype))


def normal(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random numbers, of the type of another tensor."""
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=like.dtype)


def _without(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "params"}


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return type(one) is not type(other) or repr(one) != repr(other)


def _steps(trial: Any, parameter: nn.Parameter, gradients: Sequence[Tensor]) -> None:
    _step_all(trial, {parameter: gradients})


@torch.no_grad()
def _step_all(trial: Any, gradients: dict[nn.Parameter, Sequence[Tensor]]) -> None:
    # Run torchao's optimizers uncompiled. Otherwise they compile for each shape.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in zip(*gradients.values(), strict=True):
            for parameter, gradient in zip(gradients, each, strict=True):
                parameter.grad = gradient.clone()
            type(trial).step(trial)


class _Made(TorchDispatchMode):
    """Notes the memory of each tensor that is made inside, to see later which of it is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[int, tuple[StorageWeakRef, set[tuple[int, ...]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(tree_leaves(result)):
            if not isinstance(tensor, FakeTensor):
                memory = StorageWeakRef(tensor.untyped_storage())
                before, shapes = self._shapes.get(memory.cdata, (memory, set()))
                # What is freed leaves its number to another.
                self._shapes[memory.cdata] = memory, {*(() if before.expired() else shapes), tuple(tensor.shape)}
        return result

    def outside(self, inside: Any, of: torch.Size) -> tuple[int, ...] | None:
        """A shape like a weight's of what is still in use and belongs to no tensor in `inside`."""
        own = {tensor.untyped_storage()._cdata for tensor in tensors_in(inside)}

        def found() -> tuple[int, ...] | None:
            alive = [shapes for number, (memory, shapes) in self._shapes.items() if number not in own and not memory.expired()]
            return next((shape for shapes in alive for shape in shapes if _shows(shape, of)), None)

        if found() is not None:
            gc.collect()  # it may be in a circle of references only
        return found()


@contextmanager
def _real_ones_aside(part: Any) -> Iterator[None]:
    """Inside, the real parameters have no gradients: an optimizer that a trial shares with the real one leaves them alone."""
    kept = [(parameter, parameter.grad) for group in part.param_groups for parameter in group["params"]]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@dataclass
class Trial:
    """What some steps of a new optimizer came to.

    Attributes:
        update: the last step, of the parameter's shape.
        state: what is kept for the parameter.
        outside: a shape like the parameter's of what is kept elsewhere; None: nothing is.
    """

    update: Tensor
    state: dict[str, Any]
    outside: tuple[int, ...] | None = None


def tried(
    part: Any, group: Group, weight: Tensor, gradients: Sequence[Tensor], after_first: Any = None, like: Tensor | None = None
) -> Trial:
    """Steps of a new optimizer like `part` on a weight, without weight decay and at one learning rate.

    Args:
        group: as `at_start` gives it.
        after_first: called with the parameter's state after the first step.
        like: the parameter that the weight stands for: its class and its marks may matter, and `outside` is found out.
    """
    seed_everything(0)
    parameter = _standing_for(like, weight)
    made = _Made() if like is not None else None
    with _real_ones_aside(part):
        with made or nullcontext():
            trial = _at_one_rate(part, group, parameter)
            _steps(trial, parameter, gradients[:1])
        if after_first is not None:
            after_first(trial.state[parameter])
        with made or nullcontext():
            _steps(trial, parameter, gradients[1:-1])
            before = parameter.detach().clone()
            _steps(trial, parameter, gradients[-1:])
    state = trial.state.get(parameter, {})
    outside = None if made is None else made.outside([parameter, parameter.grad, before, state], weight.shape)
    return Trial(parameter.detach() - before, state, outside)


def _at_one_rate(part: Any, group: Group, *parameters: nn.Parameter) -> Any:
    trial = anew(part, group, *parameters)
    for own in trial.param_groups:
        own["weight_decay"] = type(own.get("weight_decay", 0.0))(0)
        if own.get("lr") is not None:
            own["lr"] = torch.full_like(own["lr"], _RATE) if isinstance(own["lr"], Tensor) else _RATE
    return trial


def _standing_for(like: Tensor | None, weight: Tensor) -> Any:
    """A parameter with these values, of the same class as another one, and marked as it."""
    kind: Any = type(like)
    if like is None or kind in (Tensor, nn.Parameter) or is_wrapper(like) or isinstance(like, DTensor):
        own: Any = nn.Parameter(weight.clone())
    else:
        own = Tensor._make_subclass(kind, weight.clone(), True)
    vars(own).update({} if like is None else _marks(like))
    return own


def marked(parameter: Tensor) -> str:
    """What sets a parameter apart from others of its shape."""
    return repr(sorted(_marks(parameter).items()))


def _marks(parameter: Tensor) -> dict[str, Any]:
    """What is written on a parameter that an optimizer may go by: numbers, texts, and containers of them."""
    return {name: value for name, value in vars(parameter).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple, set, frozenset)) else is_count(value)


def _shows(shape: tuple[int, ...], of: torch.Size) -> bool:
    """Whether a tensor may have coordinates of a weight. A table of codes is as long as many a bias."""
    alike = math.prod(shape) == of.numel() > 1
    return alike or bool(set(shape) & set(of) - {1}) if max(of) < _FEW else alike and len(of) > 1


def carried(
    part: Any, group: Group, like: Tensor, weights: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], turn: Any = None
) -> tuple[Tensor, Tensor]:
    """The last steps of a new optimizer on two weights. Just before, the first weight gets another basis.

    Args:
        gradients: for each weight, its gradients in all steps.
        turn: called with the first weight and its state, both to be changed in place, and with its last gradient, for the turned
            one; None: it stays.
    """
    seed_everything(0)
    first, second = (_standing_for(like, weight) for weight in weights)
    with _real_ones_aside(part):
        trial = _at_one_rate(part, group, first, second)
        _step_all(trial, {first: gradients[0][:-1], second: gradients[1][:-1]})
        last = gradients[0][-1] if turn is None else turn(first.data, trial.state.get(first, {}), gradients[0][-1])
        before = first.detach().clone(), second.detach().clone()
        seed_everything(0)
        _step_all(trial, {first: [last], second: gradients[1][-1:]})
    return first.detach() - before[0], second.detach() - before[1]


def starts_anew(part: Any, group: Group, forget: Callable[[Any, list[nn.Parameter]], None]) -> bool:
    """Whether the step after `forget(optimizer, parameters)` is that of a new optimizer: it steps by what is in its state."""
    generator, like = torch.Generator().manual_seed(0), ones(group)
    weights, *gradients = ([normal(like.shape, generator, like) for _ in range(2)] for _ in range(5))
    updates = []
    with _real_ones_aside(part):
        for steps in (0, 3):
            own = [nn.Parameter(weight.clone()) for weight in weights]
            trial = _at_one_rate(part, at_start(part, group), *own)
            if steps:
                _step_all(trial, dict(zip(own, zip(*gradients[:steps], strict=True), strict=True)))
                forget(trial, own)
            for parameter, weight in zip(own, weights, strict=True):
                parameter.data.copy_(weight)
            seed_everything(0)
            _step_all(trial, {parameter: [last] for parameter, last in zip(own, gradients[-1], strict=True)})
            updates.append(torch.stack([p.detach() - weight for p, weight in zip(own, weights, strict=True)]))
    return torch.allclose(updates[0], updates[1], rtol=1e-3, atol=1e-3 * _RATE, equal_nan=True)


# A schedule with a warm-up begins at 0, where nothing could be seen.
_RATE = 1e-2
# Weights below this size are stand-ins, whose sizes no table of codes has.
_FEW = 200
