"""The weights of a model in an event, which every process holds whole. `Shards` are those of which each holds a part.

What differs between the two is a method here, so that a caller need not know which of them it has.
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
"""The precisions that are too low to work in."""

Arrived = Callable[[nn.Parameter], Tensor | None]
"""Gives, and takes away, what has come to a whole weight, of its shape; None: nothing."""


class Weights:
    """Weights that every process holds whole.

    Args:
        ranks: the processes that work on them.
        stored: for each parameter that stands in for another the one that it stands in for.

    Attributes:
        whole: whether a parameter has all values of its weight, and not those of this process's part only.
    """

    whole: ClassVar[bool] = True

    def __init__(self, ranks: Ranks = ALONE, stored: dict[nn.Parameter, Any] | None = None):
        self.ranks = ranks
        self._stored = stored or {}

    def origin(self, parameter: nn.Parameter) -> nn.Parameter:
        """The stored parameter of one that stands in for it; a parameter that needs no stand-in is its own."""
        return self._stored.get(parameter, parameter)

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands in for a stored parameter; one that needs no stand-in is its own."""
        return next((working for working, stored in self._stored.items() if stored is parameter), parameter)

    @torch.no_grad()
    def round(self) -> bool:
        """Round to what will be stored, to see what will come of it. Returns whether anything is stored in less precision."""
        low = [(working, stored.dtype) for working, stored in self._stored.items() if stored.dtype in LOW]
        for working, dtype in low:
            working.copy_(working.to(dtype))
        return bool(low)

    def release(self) -> None:
        """The event is over."""

    def norm(self, tensors: Iterable[Tensor | None]) -> float:
        """Euclidean norm of all the numbers in a list of tensors that are laid out as these weights are."""
        return math.hypot(*self.norms(t for t in tensors if t is not None))

    def norms(self, tensors: Iterable[Tensor]) -> list[float]:
        """The norm of each tensor."""
        return norms.norms(tensors)

    def joined(self, lengths: list[float]) -> list[float]:
        """The norms of whole tensors, from those of this process's parts."""
        return lengths

    def running(self) -> AbstractContextManager[None]:
        """To be around each forward."""
        return nullcontext()

    def in_order(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Parameters in an order that is the same in all processes."""
        return list(parameters)

    def reading(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """To be around what reads all values of these parameters, outside of `running`; all processes name the same ones."""
        return nullcontext()

    def changing(
        self, parameter: nn.Parameter, axes: Collection[int], state: Mapping[Any, Any] | None = None
    ) -> AbstractContextManager[None]:
        """To be around what mixes or scales a parameter's values along some of its axes, outside of `running`.

        Args:
            state: of the optimizer, if what it keeps for the parameter changes with it.
        """
        return nullcontext()

    def gathered(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """All of what is laid out as a parameter."""
        return values

    def changed(
        self, parameter: nn.Parameter, values: Tensor, axes: Collection[int], change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What a change along some axes makes of values that are laid out as a parameter's."""
        return change(values)

    def laid_out(self, values: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Any]:
        """Values that are laid out as their parameters', as tensors that know how they lie."""
        return values

    def vote(self) -> None:
        """In the midst of what runs `together`, before the caller's own message: go on only if no process has failed."""

    def averaging(self, arrived: Arrived) -> AbstractContextManager[dict[nn.Parameter, Tensor]]:
        """Inside `running`, before it ends: what has come to weights that will not stay whole is averaged over the processes.

        Yields:
            This process's part of the mean for each such weight that something came to in some process; complete in the end.
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
            forward: gives this process's loss.
            see: gets each weight's own gradient of this process, where that is not kept.
            options: of `torch.autograd.grad`, to keep graphs; shards let them go.

        Returns:
            This process's loss; its own gradients, if they are kept; and the means over all processes. None: it is zero.
        """

        def forward_and_backward() -> tuple[Tensor, list[Tensor | None]]:
            loss = forward()
            return loss, list(torch.autograd.grad(loss, parameters, allow_unused=True, **options))

        loss, own = self.ranks.together(forward_and_backward)
        return loss, own, self.ranks.mean_tensors(own, parameters)


WHOLE = Weights()
"""Whole weights, in one process."""
