"""What a shift of the weights does to every layer's input, multiplied with the gradient at its output."""

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.layers.trace import ReplayTrace, Use, Uses, bound
from hf_teleport.projectors import Call, projectors_for
from hf_teleport.weights.norms import norm_of
from hf_teleport.weights.region import Region

# An output head is wide that makes more than so many times what it reads.
_WIDE = 2

Product = Callable[[nn.Parameter, Region, Use, Tensor, dict[Any, Tensor]], Tensor]
"""`product(weight, region, use, shift, known)`: what is summed over the uses of a part of a weight, whose input moved by `shift`.

In `known` it may keep what it makes of this shift alone, for other weights that read the same input.
"""


def plain_product(weight: nn.Parameter, region: Region, use: Use, shift: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """`Dᵀ (X' - X)`, (G, o, d)."""
    return use.call.projector.weight_gradient(shift, use.output_gradient, region.shape)  # type: ignore[arg-type]


class TangentTrace(ReplayTrace):
    """Accumulate products of `X' - X` with D while a forward runs at shifted weights, X' being the shifted inputs.

    A part of a weight whose calls come out differently in the shifted forward gets no product.

    Attributes:
        products: for each part of a weight the sum over its calls; None or absent: there is none.
        squares: likewise `||X' - X||²` and `||X||²`, (2,).

    Args:
        uses: the uses to compare with, with their D, of the parts to follow.
        choices: those of the unshifted forward.
        product: what is made of each use and the shift of its input.
        once: the weights that are used but once in all.
    """

    def __init__(
        self,
        uses: Uses,
        choices: list[tuple[torch.Size, Tensor]],
        product: Product = plain_product,
        once: Collection[nn.Parameter] = (),
    ):
        super().__init__(uses, choices)
        self._once = {id(weight) for weight in once}
        self._left = sum(len(calls) for parts in uses.values() for calls in parts.values())
        self._awaited = {weight: {region: iter(calls) for region, calls in parts.items()} for weight, parts in uses.items()}
        self._product = product
        self._latest: _InputShift | None = None
        self.products: dict[nn.Parameter, dict[Region, Tensor | None]] = defaultdict(dict)
        self.squares: dict[nn.Parameter, dict[Region, Tensor]] = defaultdict(dict)

    def _see(self, weight: nn.Parameter, region: Region, call: Call, output: Tensor) -> None:
        awaited = self._awaited[weight].get(region)
        if awaited is None:
            return
        use = next(awaited, None)
        self._left -= use is not None
        products = self.products[weight]
        if use is None or call.input.shape != use.call.input.shape or call.projector != use.call.projector:
            products[region] = None
        elif use.output_gradient is not None and products.get(region, ()) is not None:
            shift = self._shift(call.input, use.call.input)
            self.squares[weight][region] = self.squares[weight].get(region, 0) + shift.squares
            product = self._product(weight, region, use, shift.value, shift.known)
            known = products.get(region)
            products[region] = product if known is None else known.add_(product)

    def _call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """An output head that nobody waits for behind makes zeros: with a large vocabulary, a good part of a forward."""
        if self._left <= 1:
            with torch._C.DisableTorchFunction():
                for call in filter(None, (bound(family, args, kwargs) for family in projectors_for(func))):
                    shape = call.projector.output_shape(call)
                    unawaited = self._left == 0 or id(self._parameter(call.weight)) in self._once
                    if shape is not None and unawaited and shape[-1] > _WIDE * call.input.shape[-1]:
                        return call.input.new_zeros(shape)
        return super()._call(func, args, kwargs)

    def _shift(self, moved: Tensor, start: Tensor) -> "_InputShift":
        if self._latest is None or self._latest.moved is not moved or self._latest.start is not start:
            value = moved - start
            self._latest = _InputShift(moved, start, value, torch.stack([norm_of(value), norm_of(start)]).square())
        return self._latest


@dataclass
class _InputShift:
    """`X' - X`, which is one for all weights that read the same input, as those of q, k and v do."""

    moved: Tensor
    start: Tensor
    value: Tensor
    squares: Tensor
    known: dict[Any, Tensor] = field(default_factory=dict)
