"""Forwards in float64 that stay in float64."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BACKWARDS = {torch.autograd.grad, torch.Tensor.backward}
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}


class KeepDouble(TorchFunctionMode):
    """Leave out casts of float64 to float32.

    Many models compute their norms and softmax in float32 whatever the weights are. To lower precisions that adds digits; from
    float64 it takes them away, and a small difference of two forwards would drown in the rounding.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARDS:  # in which a checkpoint runs a forward again
            with without_overrides_of_backward(), self:
                return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in _PRODUCTS and args[1].dtype == torch.float32:  # whole numbers, cast to meet what was not cast
                return func(args[0], args[1].double())
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def keeping_double(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """`KeepDouble` for a forward of weights that are all float64; of others their own way."""
    return KeepDouble() if all(p.dtype == torch.float64 for p in parameters) else nullcontext()


@contextmanager
def without_overrides_of_backward() -> Iterator[None]:
    """Likewise for the functions that go backwards."""
    with (
        mock.patch.object(torch.autograd, "has_torch_function", return_value=False),
        mock.patch.object(torch._tensor, "has_torch_function_unary", return_value=False),
    ):
        yield
