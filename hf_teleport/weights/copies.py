"""Copy an optimizer's state. This includes quantised tensors, which most torch operations do not support."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def copied(value: Any) -> Any:
    """A deep copy of a value in an optimizer's state."""
    if isinstance(value, dict):
        own = copy.copy(value)
        own.update({key: copied(each) for key, each in value.items()})
        return own
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    if is_wrapper(value):
        names, context = value.__tensor_flatten__()
        inner = {name: copied(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())
    return copy.deepcopy(value)


def put(now: Any, kept: Any) -> bool:
    """Copy a kept tensor's values into a tensor of the same layout, without new memory. Returns whether they fit."""
    if not isinstance(now, Tensor) or not isinstance(kept, Tensor) or now.shape != kept.shape or type(now) is not type(kept):
        return False
    if is_wrapper(now):
        return all(put(getattr(now, name), getattr(kept, name)) for name in now.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    now.detach().copy_(kept)
    return True


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All plain tensors in a value: in containers, in objects, and the parts of quantised tensors."""
    if is_wrapper(value):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.Generator)):
        yield from tensors_in(vars(value))


def is_wrapper(value: Any) -> bool:
    """Whether a tensor only wraps other tensors, as a quantised tensor does. Sharded tensors do not count (`weights.storage`)."""
    from torch.distributed.tensor import DTensor

    return is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)
