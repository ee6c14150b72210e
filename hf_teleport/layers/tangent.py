"""Products of `X' - X`, the change of a layer's input when the weights shift, with D, the gradient at the layer's output."""

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

# An output head counts as wide if its output has more than this many times the features of its input.
_WIDE = 2

Product = Callable[[nn.Parameter, Region, Use, Tensor, dict[Any, Tensor]], Tensor]
"""`product(weight, region, use, shift, known)`: a term for one use of a part of a weight whose input changed by `shift`.

The terms of all uses are added. `known` is a cache for results that depend on the shift only, shared by weights that read the
same input.
"""


def plain_product(weight: nn.Parameter, region: Region, use: Use, shift: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """`Dᵀ (X' - X)`, (G, o, d)."""
    return use.call.projector.weight_gradient(shift, use.output_gradient, region.shape)  # type: ignore[arg-type]


class TangentTrace(ReplayTrace):
    """Accumulate products of `X' - X` with D during a forward at shifted weights. X' are the inputs in that forward.

    If a part of a weight is called differently in the shifted forward, it gets no product.

    Attributes:
        products: for each part of a weight, the sum over its calls. None or absent: there is none.
        squares: for each part of a weight, the sums of `||X' - X||²` and `||X||²`, (2,).

    Args:
        uses: the uses in the unshifted forward, with their D. Only these parts are followed.
        choices: the choices of the unshifted forward, as `Trace.choices`.
        product: makes the term of one use.
        once: weights that are used only once in a forward.
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
        """Skip a wide output head if no followed use comes after it, and return zeros. A large vocabulary takes much time."""
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
    """`X' - X`, shared by all weights that read the same input, such as q, k and v."""

    moved: Tensor
    start: Tensor
    value: Tensor
    squares: Tensor
    known: dict[Any, Tensor] = field(default_factory=dict)
