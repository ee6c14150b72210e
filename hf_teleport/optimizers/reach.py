"""What an object holds, at any depth: in attributes, containers, functions, modules and weak references."""

import logging
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_NOT_ENTERED = (str, bytes, int, float, complex, type(None), type, ModuleType, logging.Logger)
# More than any optimizer holds; what holds more (a data set, say) is not looked through.
_MOST = 200_000


class TooMuchError(ValueError):
    """More objects than can be looked through."""


def reach(roots: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """All that some named values hold, themselves included, each once, the nearest first, with the path to it.

    Optimizers and tensors are not entered, nor are types and Python's modules. Of a function come the variables that it closes
    over, and the global ones that it names.

    Raises:
        TooMuchError: there is more of it than is looked through.
    """
    seen: dict[int, Any] = {}  # with the objects, so that none is freed and its number taken by another
    waiting = deque(roots)
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen or isinstance(value, _NOT_ENTERED):
            continue
        if len(seen) >= _MOST:
            raise TooMuchError(
                f"{path.split('.')[0]} holds more than {_MOST} objects: take what is not the optimizer's out of it"
            )
        seen[id(value)] = value
        yield path, value
        if not isinstance(value, (Tensor, Optimizer)):
            waiting.extend((f"{path}{name}", each) for name, each in _held(value))


def _held(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{_short(key)}]", each) for key, each in list(value.items())]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [(f"[{i}]", each) for i, each in enumerate(value)]
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    if isinstance(value, weakref.ReferenceType):
        return [("", value())]
    names = [
        *getattr(value, "__dict__", ()),
        *(name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)),
    ]
    return [(f".{name}", getattr(value, name)) for name in names]


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _of_function(function: FunctionType) -> Iterable[tuple[str, Any]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = [(f".{name}", cell.cell_contents) for name, cell in cells if cell != CellType()]
    named = [(f".{name}", function.__globals__[name]) for name in function.__code__.co_names if name in function.__globals__]
    # A function of another file keeps nothing for this one.
    own = [(path, each) for path, each in named if getattr(each, "__module__", "") == function.__module__ or not callable(each)]
    return [*closed, *own, ("", function.__defaults__), ("", function.__kwdefaults__), ("", vars(function))]


def _short(key: Any) -> str:
    return repr(key) if isinstance(key, (str, int)) else type(key).__name__


def has_coordinates(value: Any) -> bool:
    """Whether it is an array of more than one number, of torch or of NumPy."""
    if isinstance(value, Tensor):
        return value.numel() > 1 and not isinstance(value, nn.parameter.UninitializedParameter)
    return hasattr(value, "__array_interface__") and getattr(value, "size", 0) > 1
