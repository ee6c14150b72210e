"""The optimizers that one consists of: inside Accelerate's wrapper, several behind one object, one for each weight in hooks."""

from collections.abc import Iterator, MutableMapping
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
    """The optimizers that step: those in an object's attributes, lists and dicts (Muon and AdamW behind one), or itself.

    Transformers' layer-wise optimizers, which step in hooks, are such a dict.
    """
    optimizer = unwrapped(optimizer)
    inner = {id(each): each for value in vars(optimizer).values() for each in _optimizers_in(value)}
    if not inner or keeps_copies(optimizer):
        return [optimizer]
    return [part for each in inner.values() for part in parts(each)]


def _optimizers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (each for each in value if isinstance(each, Optimizer))
    elif isinstance(value, dict):
        yield from (each for each in value.values() if isinstance(each, Optimizer))


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
