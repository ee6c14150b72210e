"""`Weights`: a model's weights in an event, whole on every process. The subclass `Shards` is for sharded weights.

Everything that differs between the two is a method here, so that callers need not know which one they have.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_teleport.weights import norms
from hf_teleport.weights.ranks import ALONE, Ranks

LOW = (torch.bfloat16, torch.float16)
"""Precisions that are too low for an event."""

Arrived = Callable[[nn.Parameter], Tensor | None]
"""Returns the tensor that a whole weight has received, such as its gradient, and removes it there. None: there is none."""


class Weights:
    """Weights that are whole on every process.

    Args:
        ranks: the processes that work on them.
        stored: for each stand-in, the stored parameter that it replaces.

    Attributes:
        whole: whether a parameter has all values of its weight, and not only this process's part.
    """

    whole: ClassVar[bool] = True

    def __init__(self, ranks: Ranks = ALONE, stored: dict[nn.Parameter, Any] | None = None):
        self.ranks = ranks
        self._stored = stored or {}

    def origin(self, parameter: nn.Parameter) -> nn.Parameter:
        """The stored parameter of a stand-in. A parameter that has no stand-in is returned unchanged."""
        return self._stored.get(parameter, parameter)

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """The stand-in of a stored parameter. A parameter that has no stand-in is returned unchanged."""
        return next((working for working, stored in self._stored.items() if stored is parameter), parameter)

    @torch.no_grad()
    def round(self) -> bool:
        """Round to the stored precision, to test the effect. Returns whether any weight is stored in half precision."""
        low = [(working, stored.dtype) for working, stored in self._stored.items() if stored.dtype in LOW]
        for working, dtype in low:
            working.copy_(working.to(dtype))
        return bool(low)

    def release(self) -> None:
        """Release hooks at the end of the event."""

    def norm(self, tensors: Iterable[Tensor | None]) -> float:
        """Euclidean norm of all numbers in a list of tensors that are whole or sharded like these weights."""
        return math.hypot(*self.norms(t for t in tensors if t is not None))

    def norms(self, tensors: Iterable[Tensor]) -> list[float]:
        """The norm of each tensor."""
        return norms.norms(tensors)

    def joined(self, lengths: list[float]) -> list[float]:
        """The norms of whole tensors, from the norms of this process's parts."""
        return lengths

    def running(self) -> AbstractContextManager[None]:
        """A context for each forward."""
        return nullcontext()

    def in_order(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Parameters in an order that is the same on all processes."""
        return list(parameters)

    def reading(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """A context for code outside of `running` that reads all values of these parameters. All processes must name the same."""
        return nullcontext()

    def changing(
        self, parameter: nn.Parameter, axes: Collection[int], state: Mapping[Any, Any] | None = None
    ) -> AbstractContextManager[None]:
        """A context for code outside of `running` that mixes or scales a parameter's values along some of its axes.

        Args:
            state: the optimizer's state, if it changes with the parameter.
        """
        return nullcontext()

    def gathered(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """The whole tensor, from values that are whole or sharded like a parameter."""
        return values

    def changed(
        self, parameter: nn.Parameter, values: Tensor, axes: Collection[int], change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Apply a change along some axes to values that are whole or sharded like a parameter."""
        return change(values)

    def laid_out(self, values: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Any]:
        """Values as tensors that know how they are sharded: plain tensors here, `DTensor`s for shards."""
        return values

    def vote(self) -> None:
        """Before a message inside `Ranks.together`: continue only if no process has failed."""

    def averaging(self, arrived: Arrived) -> AbstractContextManager[dict[nn.Parameter, Tensor]]:
        """Inside `running`: average what sharded weights receive over the processes, when they are closed.

        Yields:
            This process's part of the mean, for each sharded weight that received a tensor on any process. It is complete at the
            end.
        """
        return nullcontext({})

    def gradients(
        self,
        forward: Callable[[], Tensor],
        parameters: list[nn.Parameter],
        see: Callable[[nn.Parameter, Tensor], None],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """A forward and a backward. `.grad` is not touched.

        Args:
            forward: returns this process's loss.
            parameters: the parameters whose gradients are computed.
            see: for sharded weights, is called with each weight and this process's own gradient, which is not kept.
            options: options of `torch.autograd.grad` to keep graphs. Shards ignore them.

        Returns:
            This process's loss; its own gradients, if they are kept; and the means over all processes. None: the gradient is
            zero.
        """

        def forward_and_backward() -> tuple[Tensor, list[Tensor | None]]:
            loss = forward()
            return loss, list(torch.autograd.grad(loss, parameters, allow_unused=True, **options))

        loss, own = self.ranks.together(forward_and_backward)
        return loss, own, self.ranks.mean_tensors(own, parameters)


WHOLE = Weights()
"""Whole weights, in one process."""


class Copies:
    """Stand-ins for parameters: those given, and copies of others."""

    def __init__(self, given: dict[nn.Parameter, nn.Parameter]):
        self._made = dict(given)

    def __call__(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in self._made:
            self._made[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        return self._made[parameter]
