"""Keep a forward in float64, even where the model casts to float32."""

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
    """Skip casts from float64 to float32.

    Many models compute norms and softmax in float32, whatever the dtype of the weights. That helps lower precisions. From
    float64 it loses digits, and a small difference between two forwards would be lost in rounding.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARDS:  # activation checkpointing runs a forward again inside a backward
            with without_overrides_of_backward(), self:
                return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in _PRODUCTS and args[1].dtype == torch.float32:
                # The model cast integers to float32 here, and the other factor is still float64.
                return func(args[0], args[1].double())
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def keeping_double(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """`KeepDouble` if all weights are float64. Otherwise a context that does nothing."""
    return KeepDouble() if all(p.dtype == torch.float64 for p in parameters) else nullcontext()


@contextmanager
def without_overrides_of_backward() -> Iterator[None]:
    """Inside, `backward` and `autograd.grad` run without torch function modes."""
    with (
        mock.patch.object(torch.autograd, "has_torch_function", return_value=False),
        mock.patch.object(torch._tensor, "has_torch_function_unary", return_value=False),
    ):
        yield
