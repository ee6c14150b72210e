"""The optimizers that one consists of: inside Accelerate's wrapper, several behind one object, one for each weight in hooks."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the one that Accelerate wraps around it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def parts(optimizer: Any) -> list[Any]:
    """The optimizers that step: those inside an object (Muon and AdamW behind one), or itself.

    Transformers' layer-wise optimizers, which step in hooks, are in a dict.
    """
    optimizer = unwrapped(optimizer)
    inner = [] if keeps_copies(optimizer) else inside(optimizer)
    return list({id(part): part for each in inner for part in parts(each)}.values()) or [optimizer]


# Not of the optimizer's own: what it steps and keeps, and what schedulers and hooks put on it.
_PUT_ON_IT = ("param_groups", "state", "defaults", "step")
_HOOKS = "_optimizer_step_"
# A list in a dict in an object is three levels down.
_LEVELS = 4


def inside(optimizer: Any) -> list[Any]:
    """The optimizers in an optimizer's attributes: also in containers, in plain objects, and in functions that hold one."""
    seen = {id(optimizer)}
    own = {name: value for name, value in vars(optimizer).items() if name not in _PUT_ON_IT and not name.startswith(_HOOKS)}
    return list(_optimizers_in(own, seen, _LEVELS))


def _optimizers_in(value: Any, seen: set[int], levels: int) -> Iterator[Any]:
    if isinstance(value, Optimizer):
        value = unwrapped(value)
    if id(value) in seen or not levels or isinstance(value, (Tensor, nn.Module, type, ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, Optimizer):
        yield value
        return
    if isinstance(value, Mapping):
        held: Iterable[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        held = value
    elif isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    elif isinstance(value, (partial, MethodType)):
        held = [value.__self__] if isinstance(value, MethodType) else [value.func, value.args, value.keywords]
    else:
        held = list(getattr(value, "__dict__", {}).values())
    for each in held:
        yield from _optimizers_in(each, seen, levels - 1)


def beyond_trial(optimizer: Any) -> str:
    """Why an optimizer's steps can't be tried on copies, for they would step the weights themselves; empty: they can."""
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
