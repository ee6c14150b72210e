"""The gradient of the teleport objective, projected: by one shifted forward, or by double backward.

The objective is `½ ||∇_W L||²`; its gradient is `H g`, the Hessian times the loss gradient g. For a layer
`Z = X Wᵀ` with `D = ∂L/∂Z`, the loss gradient is `g = Dᵀ X`, and along any direction u (a dot is the derivative along u)

    (H u) = Ḋᵀ X + Dᵀ Ẋ        and, projected at tau = 1,        (H u) P = Dᵀ Ẋ P,

because `X P = 0`. D is at hand after the backward pass that made g; Ẋ is a difference of two forwards. So nothing
is differentiated twice, and any attention kernel will do. docs/mathematics.md has the whole derivation.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_teleport.layers.double import keeping_double
from hf_teleport.layers.hessian import hessian_vector_product
from hf_teleport.layers.layer import Layer, laid_out_like
from hf_teleport.layers.point import LossFn, Point, start_afresh
from hf_teleport.layers.shift import shifted
from hf_teleport.layers.subspace import Subspace
from hf_teleport.layers.tangent import TangentTrace
from hf_teleport.layers.trace import ReplayTrace, Trace, Use, Uses
from hf_teleport.weights.ranks import ALONE, Ranks
from hf_teleport.weights.region import Region
from hf_teleport.weights.whole import WHOLE, Weights

_Trace = TypeVar("_Trace", bound=Trace)

# A shift is too long if it moves an input by `_LONG_SHIFT` times the intended share of the input's size. Then a shorter shift is
# tried, up to `_SHIFTS` in all. It is no shorter than it must be (`_AIM`), because rounding matters less in longer shifts.
_LONG_SHIFT = 5
_SHIFTS = 4
_AIM = 3


@dataclass
class ShiftLength:
    """How far `fast_direction` shifts the weights, as a share of their norm; None until a first shift suggests the next.

    `size` is that norm, taken at the first shift: a teleport hardly changes it.
    """

    share: float | None = None
    size: float | None = None


def fast_direction(
    model: nn.Module,
    loss_fn: LossFn,
    point: Point,
    direction: list[Tensor | None],
    layers: list[Layer],
    subspaces: dict[Layer, Subspace] | None = None,
    shift: ShiftLength | None = None,
    weights: Weights = WHOLE,
    length: float | None = None,
) -> dict[Layer, Tensor] | dict[nn.Parameter, Tensor]:
    """`Dᵀ Ẋ` along a direction u for each layer, by one forward without autograd at `W + εu`.

    Equal to `H u` up to a part in the span of the layer's inputs, so after a projection at tau = 1 to `(H u) P`. The shift is
    `ε = 100 sqrt(eps) ||W|| / ||u||`: longer than where truncation and rounding balance, because truncation is the same
    however the data is split over processes, and rounding is not. If it moves some layer's input by far more than that share of
    its size, the network is more sensitive than its weights show, and a shorter shift is tried. A layer norm of a nearly constant
    input is an example. In float64 it is the difference of two forwards, at `W ± εu`, with ε in proportion to the cube root of
    eps. The casts to float32 that many models contain are then off.

    Args:
        subspaces: project onto the null space of each layer too, `Dᵀ Ẋ P`.
        shift: the length to begin with, and where the length that was good enough is left for the next call.
        length: the norm of u, if it is known.

    Returns:
        For each layer (G, o, d), with one more column for a bias. The column is zero until a projection, because a bias comes
        after the input and cannot shift it. Of weights that stay sharded, for each parameter this process's part.
    """
    length = weights.norm(direction) if length is None else length
    if length == 0 or not layers:
        return {}
    dtype = layers[0].weight.dtype
    of_use = {(layer.weight, layer.region): layer for layer in layers}
    uses: Uses = {layer.weight: {} for layer in layers}
    unreached = []
    for layer in layers:
        calls = point.trace.uses[layer.weight][layer.region]
        if any(use.reached for use in calls):
            uses[layer.weight][layer.region] = calls
        else:
            unreached.append(layer)
    central = dtype == torch.float64
    eps = torch.finfo(dtype).eps
    small = 12 * eps ** (1 / 3) if central else 100 * eps**0.5
    shift = shift or ShiftLength()
    shift.share = shift.share or small
    shift.size = shift.size or weights.norm(point.parameters)

    def product(weight: nn.Parameter, region: Region, use: Use, shifted_by: Tensor, known: dict[Any, Tensor]) -> Tensor:
        layer = of_use[weight, region]
        return layer.tangent(use, shifted_by, None if subspaces is None else subspaces[layer], known)

    # The audit has seen that nothing reads a weight but what was followed. One that is read again and again is shifted once for
    # all, and so is a shard, which no torch call reads.
    calls_of = {weight: sum(map(len, point.trace.uses[weight].values())) for weight in uses}
    once = [weight for weight, calls in calls_of.items() if calls == 1]
    when_read = once if weights.whole else []

    def difference(epsilon: float) -> tuple[TangentTrace, dict[nn.Parameter, Tensor]]:
        starts = uses
        if central:
            behind = ReplayTrace(uses, point.trace.choices)
            with shifted(point.parameters, direction, -epsilon, when_read), weights.running():
                _forward(model, loss_fn, point, behind)
            starts = _starting_at(uses, behind.uses)
        ahead = TangentTrace(starts, point.trace.choices, product, once)
        there = shifted(point.parameters, direction, epsilon, when_read)
        with there, weights.running(), weights.averaging(partial(_arrived, ahead, layers, {})) as means:
            return _forward(model, loss_fn, point, ahead), means

    for attempt in range(_SHIFTS):
        epsilon = shift.share * shift.size / length
        trace, means = weights.ranks.together(partial(difference, epsilon))
        relative_shift = _relative_shift(trace, layers, weights.ranks)
        if relative_shift <= _LONG_SHIFT * small or attempt == _SHIFTS - 1:
            break
        trace.products.clear()  # as large as the weights
        means.clear()
        # In float64 rounding is far away.
        shorter = small if central else _AIM * small
        shift.share *= shorter / relative_shift if relative_shift < math.inf else shorter
    shift.share = min(small, shift.share * _AIM * small / relative_shift) if 0 < relative_shift < math.inf else small
    # Divided last: a projection tells by norms, and the squares of what the small gradients of a trained model leave underflow.
    width = 2 * epsilon if central else epsilon
    if not weights.whole:
        return {parameter: mean.div_(width) for parameter, mean in means.items()}
    found = {layer: trace.products[layer.weight].get(layer.region) for layer in layers}
    products = {layer: product.div_(width) for layer, product in found.items() if product is not None}
    products |= {layer: layer.weight.new_zeros(layer.shape) for layer in unreached}
    return _mean(products, layers, weights.ranks)


def _arrived(
    trace: TangentTrace, layers: list[Layer], room: dict[nn.Parameter, Tensor], parameter: nn.Parameter
) -> Tensor | None:
    """What a shifted forward has made so far of a weight or bias, laid out as that is, to be taken away.

    Args:
        room: for a bias whose weight comes first.
    """

    def of(part: nn.Parameter) -> Tensor:
        if part not in room:
            room[part] = laid_out_like(part, None)
        return room[part]

    for layer in layers:
        if layer.weight is parameter and (product := trace.products[parameter].pop(layer.region, None)) is not None:
            layer.add_(product, 1.0, of)
    return room.pop(parameter, None)


def _relative_shift(trace: TangentTrace, layers: list[Layer], ranks: Ranks) -> float:
    """`||X' - X|| / ||X||` of the layer whose input moved most. An input of zeros has no scale, and does not count."""
    squares = [trace.squares[layer.weight].get(layer.region) for layer in layers]
    means = ranks.mean_tensors(squares, (layer.weight.new_zeros(2, dtype=torch.float64) for layer in layers))
    return max((float((m[0] / m[1]).nan_to_num(0, 0, 0)) for m in means if m is not None), default=0.0) ** 0.5


def _mean(products: dict[Layer, Tensor], layers: list[Layer], ranks: Ranks) -> dict[Layer, Tensor]:
    """The mean over all processes of each layer's product."""
    if ranks.size == 1:
        return products
    like = (layer.matrix({p: p.detach() for p in layer.parameters}) for layer in layers)
    means = ranks.mean_tensors([products.get(layer) for layer in layers], like)
    return {layer: mean for layer, mean in zip(layers, means, strict=True) if mean is not None}


def _forward(model: nn.Module, loss_fn: LossFn, point: Point, trace: _Trace) -> _Trace:
    """A traced forward without autograd, drawing the random numbers that the point's forward drew."""
    start_afresh(model, point.seed)
    with torch.no_grad(), keeping_double(model.parameters()), trace:
        loss_fn(model, point.batch)
    return trace


def _starting_at(uses: Uses, others: Uses) -> Uses:
    """The same uses, D included, with the inputs of another forward."""
    return {
        weight: {
            region: [
                Use(other.call, use.output_gradient, use.reached)
                for use, other in zip(calls, others[weight][region], strict=False)
            ]
            for region, calls in parts.items()
        }
        for weight, parts in uses.items()
    }


def exact_direction(
    point: Point, direction: list[Tensor | None], layers: list[Layer], ranks: Ranks = ALONE
) -> dict[Layer, Tensor]:
    """`H u` for each layer by double backward, as matrices like those of `fast_direction`, bias column included.

    Needs a point made with `differentiable_gradients=True`.

    Raises:
        ValueError: an operation of the model cannot be differentiated twice.
    """
    wanted = [p for layer in layers for p in layer.parameters]

    def own() -> dict[Layer, Tensor]:
        products = dict(zip(wanted, hessian_vector_product(point, direction, wanted), strict=True))
        return {layer: layer.matrix(products) for layer in layers if products[layer.weight] is not None}

    return _mean(ranks.together(own), layers, ranks)
