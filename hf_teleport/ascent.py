"""The gradient of the teleport objective, projected: by one shifted forward, or by double backward.

The objective is `½ ||∇_W L||²`; its gradient is `H g`, the Hessian times the loss gradient g. For a layer
`Z = X Wᵀ` with `D = ∂L/∂Z`, the loss gradient is `g = Dᵀ X`, and along any direction u (a dot is the derivative along u)

    (H u) = Ḋᵀ X + Dᵀ Ẋ        and, projected at tau = 1,        (H u) P = Dᵀ Ẋ P,

because `X P = 0`. D is at hand after the backward pass that made g; Ẋ is a difference of two forwards. So nothing
is differentiated twice, and any attention kernel will do. docs/mathematics.md has the whole derivation.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_teleport.isolation import forget_caches, seed_everything, shifted
from hf_teleport.layers import Layer
from hf_teleport.trace import KeepDouble, TangentTrace, Trace, Use, Uses

_Trace = TypeVar("_Trace", bound=Trace)

# A shift is too long if it moves some input by more than this many times sqrt(eps) of its size; this many are tried.
_LONG_SHIFT = 100
_SHIFTS = 4

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)`: the mean loss of the batch, a scalar."""


@dataclass
class Point:
    """The loss on one batch at the current weights, and what came of its forward and backward.

    Attributes:
        loss: the mean loss.
        gradients: one for each parameter, None where the loss does not depend on it.
        trace: the uses of the parameters, with D.
    """

    batch: Any
    seed: int
    loss: float
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    trace: Trace

    @property
    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of the parameters that the loss depends on."""
        pairs = zip(self.parameters, self.gradients, strict=True)
        return {parameter: gradient.detach() for parameter, gradient in pairs if gradient is not None}

    @property
    def grad_norm(self) -> float:
        """`||∇_W L||` over all trainable parameters."""
        return norm(self.gradients)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def norm(tensors: Iterable[Tensor | None]) -> float:
    """Euclidean norm of all the numbers in a list of tensors, accumulated in float64."""
    real = (torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in tensors if t is not None)
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in real]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))) if norms else 0.0


def evaluate(model: nn.Module, loss_fn: LossFn, batch: Any, *, seed: int, differentiable_gradients: bool = False) -> Point:
    """One forward and backward at the current weights, followed by a `Trace`. `.grad` is not touched.

    Args:
        seed: for models that draw random numbers in eval mode: each forward on this batch draws the same.
        differentiable_gradients: keep the graph of the gradients, for `exact_direction`.

    Raises:
        ValueError: the loss is not a scalar, or depends on no trainable parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    trace = Trace(parameters)
    _start_afresh(model, seed)
    # Fused attention kernels have no second derivative; the plain one does.
    plain_kernels = sdpa_kernel([SDPBackend.MATH]) if differentiable_gradients else nullcontext()
    with torch.enable_grad(), trace, plain_kernels:
        loss = loss_fn(model, batch)
    _check_loss(loss)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, create_graph=differentiable_gradients)
    return Point(batch, seed, float(loss.detach()), parameters, list(gradients), trace)


def _start_afresh(model: nn.Module, seed: int) -> None:
    """Before a forward: nothing cached from other weights, and the random numbers of this seed."""
    forget_caches(model)
    seed_everything(seed)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn must return the mean loss as a scalar tensor, but returned {got}.")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trainable parameter: check that parameters have requires_grad=True and that "
            "loss_fn computes the loss with gradients enabled and does not detach it."
        )


def fast_direction(
    model: nn.Module, loss_fn: LossFn, point: Point, direction: list[Tensor | None], layers: list[Layer]
) -> dict[Layer, Tensor]:
    """`Dᵀ Ẋ` along a direction u for each layer, by one forward without autograd at `W + εu`.

    Equal to `H u` up to a part in the span of the layer's inputs, so after a projection at tau = 1 to `(H u) P`. The shift is
    `ε = sqrt(eps) ||W|| / ||u||`, where truncation and rounding errors balance for the precision of the weights. If it moves
    some layer's input by far more than sqrt(eps) of its size, the network is more sensitive than its weights show (a layer norm
    of a nearly constant input, for instance), and a shorter one is tried. In float64 the unshifted forward is run once more as
    well, all of them without the casts to float32 that many models contain.

    Returns:
        For each layer (G, o, d), with one more column, of zeros, for a bias: it comes after the input, which it cannot shift.
    """
    length = norm(direction)
    if length == 0 or not layers:
        return {}
    dtype = layers[0].weight.dtype
    uses: Uses = {layer.weight: {} for layer in layers}
    for layer in layers:
        uses[layer.weight][layer.region] = point.trace.uses[layer.weight][layer.region]
    if dtype == torch.float64:
        precise = _forward(model, loss_fn, point, Trace(uses), dtype)
        uses = _in_double(uses, precise.uses)
    small = torch.finfo(dtype).eps ** 0.5
    epsilon = small * norm(point.parameters) / length
    for attempt in range(_SHIFTS):
        with shifted(point.parameters, direction, epsilon):
            trace = _forward(model, loss_fn, point, TangentTrace(uses, point.trace.choices), dtype)
        relative_shift = trace.relative_shift()
        if relative_shift <= _LONG_SHIFT * small or attempt == _SHIFTS - 1:
            break
        epsilon *= small / relative_shift
    products = {}
    for layer in layers:
        product = trace.products[layer.weight].get(layer.region)
        if product is not None:
            no_bias_part = product.new_zeros((*product.shape[:-1], 1))
            products[layer] = (product if layer.bias is None else torch.cat([product, no_bias_part], -1)) / epsilon
    return products


def _forward(model: nn.Module, loss_fn: LossFn, point: Point, trace: _Trace, dtype: torch.dtype) -> _Trace:
    """A traced forward without autograd, drawing the random numbers that the point's forward drew."""
    _start_afresh(model, point.seed)
    with torch.no_grad(), KeepDouble() if dtype == torch.float64 else nullcontext(), trace:
        loss_fn(model, point.batch)
    return trace


def _in_double(uses: Uses, precise: Uses) -> Uses:
    """The same uses, D included, with their inputs taken from a forward that never left float64."""
    return {
        weight: {
            region: [Use(p.call, use.output_gradient) for use, p in zip(calls, precise[weight][region], strict=False)]
            for region, calls in parts.items()
        }
        for weight, parts in uses.items()
    }


def exact_direction(point: Point, direction: list[Tensor | None], layers: list[Layer]) -> dict[Layer, Tensor]:
    """`H u` for each layer by double backward, as matrices like those of `fast_direction`, bias column included.

    Needs a point made with `differentiable_gradients=True`.

    Raises:
        ValueError: an operation of the model cannot be differentiated twice.
    """
    pairs = [
        (g, u.detach())
        for g, u in zip(point.gradients, direction, strict=True)
        if g is not None and u is not None and g.requires_grad
    ]
    if not pairs or not layers:
        return {}
    inner = sum(((g * u).sum() for g, u in pairs), start=torch.zeros((), device=pairs[0][0].device))
    wanted = [p for layer in layers for p in layer.parameters]
    try:
        found = torch.autograd.grad(inner, wanted, allow_unused=True, retain_graph=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"hessian='exact' needs operations that can be differentiated twice ({error}); use 'fast'.") from error
    products: dict[nn.Parameter, Tensor | None] = dict(zip(wanted, found, strict=True))
    return {layer: layer.matrix(products) for layer in layers if products[layer.weight] is not None}
