"""Weights that stand elsewhere for a while: at `W + epsilon u`, and then where they were."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_teleport.layers.trace import tensors_in

# Methods that read no number of a tensor.
_QUESTIONS = {"data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "storage_offset", "stride", "untyped_storage"}


@contextmanager
def shifted(
    parameters: Iterable[nn.Parameter],
    directions: Iterable[Tensor | None],
    epsilon: float,
    when_read: Collection[nn.Parameter] = (),
) -> Iterator[None]:
    """The parameters stand at `W + epsilon u` inside, and are bit for bit what they were after.

    Args:
        directions: u for each parameter; None: it stays.
        when_read: those of them that stand there only as long as a torch call reads them, so that no second copy of all weights
            is held. To read them otherwise is to read W; what a `Trace` has followed is read by torch calls.
    """
    # A view knows its place in the memory that it was made in: both memories must begin with the weight.
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
                # With the strides of the original, by which views of it are known.
                moved = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device)
                parameter.data = torch.add(data, direction, alpha=epsilon, out=moved)
        with _WhenRead(later, epsilon) if later else nullcontext():
            yield
    finally:
        for parameter, data in originals:
            parameter.data = data


class _WhenRead(TorchFunctionMode):
    """Around each torch call the parameters that it reads are shifted."""

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
        # Its dtype and the like are those of W. An address must not be that of a copy that goes at once.
        if not read or name in _QUESTIONS or (name == "__get__" and not isinstance(func(*args, **kwargs), Tensor)):
            return func(*args, **kwargs)
        with shifted(read.values(), [self._directions[key] for key in read], self._epsilon):
            return func(*args, **kwargs)
