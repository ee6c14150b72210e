"""Shift weights to `W + epsilon u` for a while, and put them back bit for bit."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_teleport.layers.trace import tensors_in

# Tensor methods that read no values.
_QUESTIONS = {"data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "storage_offset", "stride", "untyped_storage"}


@contextmanager
def shifted(
    parameters: Iterable[nn.Parameter],
    directions: Iterable[Tensor | None],
    epsilon: float,
    when_read: Collection[nn.Parameter] = (),
) -> Iterator[None]:
    """Inside, the parameters are at `W + epsilon u`. Afterwards they are bit for bit what they were.

    Args:
        directions: u for each parameter. None: the parameter is not shifted.
        when_read: parameters that are shifted only while a torch call reads them. This saves a second copy of all weights. Other
            ways to read them see W. All uses that a `Trace` has followed are torch calls.
    """
    # A view has an offset into its storage. It stays valid only if the weight begins at offset 0 in both storages.
    waiting = {id(parameter) for parameter in when_read if parameter.storage_offset() == 0}
    later: dict[int, Tensor] = {}
    originals = []
    try:
        for parameter, direction in zip(parameters, directions, strict=True):
            if direction is not None and id(parameter) in waiting:
                later[id(parameter)] = direction
            elif direction is not None:
                data = parameter.data
                originals.append((parameter, data))
                # The same strides as the original, because views are recognised by their strides.
                moved = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device)
                parameter.data = torch.add(data, direction, alpha=epsilon, out=moved)
        with _WhenRead(later, epsilon) if later else nullcontext():
            yield
    finally:
        for parameter, data in originals:
            parameter.data = data


class _WhenRead(TorchFunctionMode):
    """Shifts the parameters that a torch call reads, during that call."""

    def __init__(self, directions: dict[int, Tensor], epsilon: float):
        super().__init__()
        self._directions = directions
        self._epsilon = epsilon

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read: dict[int, Any] = {id(t): t for t in tensors_in((*args, *kwargs.values())) if id(t) in self._directions}
        name = getattr(func, "__name__", "")
        # Questions about dtype, shape or address are answered for W. The address of the short-lived copy would be wrong.
        if not read or name in _QUESTIONS or (name == "__get__" and not isinstance(func(*args, **kwargs), Tensor)):
            return func(*args, **kwargs)
        with shifted(read.values(), [self._directions[key] for key in read], self._epsilon):
            return func(*args, **kwargs)
