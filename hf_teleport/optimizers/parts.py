"""The optimizers that one consists of: inside Accelerate's wrapper, several behind one object, one for each weight in hooks."""

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_teleport.optimizers.reach import TooMuchError, reach


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the one that Accelerate wraps around it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def parts(optimizer: Any, _around: tuple[Any, ...] = ()) -> list[Any]:
    """The optimizers that step: those inside an object (Muon and AdamW behind one) or in hooks, or itself."""
    optimizer = unwrapped(optimizer)
    inner = [] if keeps_copies(optimizer) else inside(optimizer, hooks=not _around)
    around = (*_around, optimizer)
    own = [part for each in inner if not any(each is known for known in around) for part in parts(each, around)]
    return list({id(part): part for part in own}.values()) or [optimizer]


# What it steps and keeps, and what schedulers and hooks put on it.
_PUT_ON_IT = ("param_groups", "state", "defaults", "step")
_HOOKS = "_optimizer_step_"


def own_attributes(optimizer: Any) -> dict[str, Any]:
    """An optimizer's attributes, except those that every optimizer has."""
    return {k: v for k, v in vars(optimizer).items() if k not in _PUT_ON_IT and not k.startswith(_HOOKS)}


def inside(optimizer: Any, hooks: bool = False) -> list[Any]:
    """The optimizers that one holds, at any depth (`reach`); with `hooks` those too in hooks on its parameters' gradients."""
    roots = [*own_attributes(optimizer).items(), *(("a hook", hook) for hook in (gradient_hooks(optimizer) if hooks else ()))]
    found: dict[int, Any] = {}
    try:
        for _, value in reach(roots):
            if isinstance(value, Optimizer) and (inner := unwrapped(value)) is not optimizer:
                found[id(inner)] = inner
    except TooMuchError:  # a trial of its steps shows what was not found here
        pass
    return list(found.values())


def gradient_hooks(optimizer: Any) -> list[Any]:
    """The functions that run when a gradient of an optimizer's parameters is ready."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooks = [hooks for p in parameters for hooks in (p._post_accumulate_grad_hooks, p._backward_hooks) if hooks]
    return [hook for each in hooks for hook in each.values()]


def beyond_trial(optimizer: Any) -> str:
    """Why an optimizer's steps can't be tried on copies: they would change the weights themselves. Empty: they can be tried."""
    outer, stepping = unwrapped(optimizer), parts(optimizer)
    trained = {p for part in stepping for group in part.param_groups for p in group["params"]}
    of_its_own = [p for group in outer.param_groups for p in group["params"] if p.requires_grad and p not in trained]
    for part in [outer] if of_its_own else stepping:
        if inner := inside(part):
            return f"{type(part).__name__} steps weights by an optimizer inside it ({type(inner[0]).__name__})"
    return ""


def keeps_copies(optimizer: Any) -> bool:
    """Whether an optimizer seems to keep copies of the weights, which do not follow a teleport: Lookahead, schedule-free ones."""
    optimizer = unwrapped(optimizer)
    return hasattr(optimizer, "optimizer") or callable(getattr(optimizer, "train", None))


def steps_copies(optimizer: Any, model: Iterable[nn.Parameter]) -> str:
    """Why the next step would undo a teleport: the optimizer steps copies of the model's weights; empty: it does not.

    Args:
        model: the parameters of the model.
    """
    own, stepped = set(model), set(groups_of(optimizer))
    left = {parameter.shape for parameter in own - stepped if parameter.requires_grad}
    foreign = [parameter for parameter in stepped - own if parameter.shape in left]
    if not foreign:
        return ""
    return f"{type(unwrapped(optimizer)).__name__} steps tensors of shape {list(foreign[0].shape)} that are not the model's"


class States(MutableMapping[Any, Any]):
    """The states of several optimizers as one mapping. What is new in it belongs to none of them."""

    def __init__(self, optimizers: list[Any]):
        self._new: dict[Any, Any] = {}
        self._all = [self._new, *(optimizer.state for optimizer in optimizers)]
        self._own = {p: each.state for each in optimizers for group in each.param_groups for p in group["params"]}

    def __getitem__(self, key: Any) -> Any:
        if key not in self._own.get(key, self._new):  # a defaultdict would make an entry
            raise KeyError(key)
        return self._own.get(key, self._new)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own.get(key, self._new)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._own.get(key, self._new)[key]

    def __iter__(self) -> Iterator[Any]:
        return (key for state in self._all for key in state)

    def __len__(self) -> int:
        return sum(map(len, self._all))


def states(optimizer: Any) -> MutableMapping[Any, Any]:
    """What an optimizer keeps for each parameter, whichever of its parts keeps it."""
    found = parts(optimizer)
    return found[0].state if len(found) == 1 else States(found)


def groups_of(optimizer: Any) -> dict[nn.Parameter, tuple[Any, dict[str, Any]]]:
    """For each parameter the optimizer that steps it, and its group there."""
    return {parameter: (part, group) for part in parts(optimizer) for group in part.param_groups for parameter in group["params"]}


def is_count(value: Any) -> bool:
    """Whether a value in a state has no coordinates: a number, a flag, nothing."""
    return value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.numel() <= 1)
