"""The loss and its gradient on a batch at the current weights, by a forward and backward, or by a backward alone.

A move that changes no activation leaves the graph of an earlier forward valid, except for the weights that it saved. With saved
tensor hooks a backward through that graph reads the current weights.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_teleport.layers.double import keeping_double
from hf_teleport.layers.layer import bias_error, weight_error
from hf_teleport.layers.trace import Trace
from hf_teleport.weights.isolation import forget_caches, seed_everything
from hf_teleport.weights.norms import norm
from hf_teleport.weights.ranks import ALONE, Ranks
from hf_teleport.weights.whole import WHOLE, Weights

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)`: the mean loss of the batch, a scalar."""


@dataclass
class Point:
    """The loss on one batch at the current weights, and the results of its forward and backward.

    If several processes share the batch, loss and gradients are means over all of them. `own_gradients` and the trace belong to
    this process's share.

    Attributes:
        loss: the mean loss.
        gradients: one for each parameter. None: the loss does not depend on it.
        grad_norm: `||∇_W L||` over all trainable parameters.
        trace: the uses of the parameters, with D.
        graph: the loss with its graph, if it was kept for `evaluate_again`.
        errors: replaces `own_gradients` if the weights stay sharded. For each followed weight and bias, the relative difference
            between its gradient and the gradient that the followed uses imply.
    """

    batch: Any
    seed: int
    loss: float
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    own_gradients: list[Tensor | None]
    grad_norm: float
    trace: Trace
    graph: Tensor | None = None
    errors: dict[nn.Parameter, float] = field(default_factory=dict)

    @property
    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of the parameters that the loss depends on."""
        pairs = zip(self.parameters, self.gradients, strict=True)
        return {parameter: gradient.detach() for parameter, gradient in pairs if gradient is not None}

    def reaches(self, parameter: nn.Parameter) -> bool:
        """Whether the loss on this process's share depends on a parameter."""
        return parameter in self.errors or parameter in self._own

    def error(self, parameter: nn.Parameter, judge: Callable[[Tensor], float]) -> float:
        """What `judge` returns for this process's own gradient. If that gradient is gone, its earlier answer."""
        return self.errors[parameter] if parameter in self.errors else judge(self._own[parameter])

    @cached_property
    def _own(self) -> dict[nn.Parameter, Tensor]:
        return {p: g.detach() for p, g in zip(self.parameters, self.own_gradients, strict=False) if g is not None}

    def release(self) -> None:
        """Free the gradients, the largest part of a step's memory."""
        self.gradients, self.own_gradients = [], []
        self.__dict__.pop("_own", None)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def evaluate(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    seed: int,
    differentiable_gradients: bool = False,
    keep_graph: bool = False,
    follow: Iterable[nn.Parameter] | None = None,
    weights: Weights = WHOLE,
) -> Point:
    """One forward and backward at the current weights, followed by a `Trace`. `.grad` is not touched.

    Args:
        batch: the batch. With several processes, this process's share of it.
        seed: for models that draw random numbers in eval mode. Each forward on this batch draws the same numbers.
        differentiable_gradients: keep the graph of the gradients, for `exact_direction`.
        keep_graph: keep the graph of the loss, for `evaluate_again`. It is not kept if backward reads copies of weights on any
            process.
        follow: the parameters whose uses are traced. Default: all trainable parameters.
        weights: the model's weights, and the processes that share the batch.

    Raises:
        ValueError: the loss is not a scalar, or depends on no trainable parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    trace = Trace(parameters if follow is None else follow)
    saved = _Saved()
    errors: dict[nn.Parameter, float] = {}
    start_afresh(model, seed)
    with ExitStack() as around:
        around.enter_context(keeping_double(model.parameters()))
        if differentiable_gradients:
            # Fused attention kernels have no second derivative; the plain one does.
            around.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if keep_graph:
            around.enter_context(saved)

        def forward() -> Tensor:
            with torch.enable_grad(), trace:
                loss = loss_fn(model, batch)
            _check_loss(loss)
            return loss

        def see(parameter: nn.Parameter, gradient: Tensor) -> None:
            if parameter in trace.uses:
                errors[parameter] = weight_error(parameter, trace.uses[parameter], gradient)
            else:
                errors[parameter] = bias_error(trace.with_bias(parameter), gradient)

        graphs = {"create_graph": differentiable_gradients, "retain_graph": keep_graph or None}
        loss, own, gradients = weights.gradients(forward, parameters, see, **graphs)
    again = keep_graph and saved.covers(trace)
    mean, length, agreed = weights.ranks.mean([float(loss.detach()), weights.norm(gradients), float(again)])
    return Point(batch, seed, mean, parameters, gradients, own, length, trace, loss if agreed == 1 else None, errors)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Inside, autograd saves tensors without a version check, so a later backward reads the current weights.

    Without these hooks autograd refuses a backward through weights that were changed.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        super().__init__(self._keep, lambda saved: saved)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._seen.add(id(tensor if tensor._base is None else tensor._base))
        # Detached, because a node that keeps its own output is a reference cycle that the garbage collector can't free.
        return tensor.detach()

    def covers(self, trace: Trace) -> bool:
        """Whether backward reads the followed weights themselves. An einsum may save a copy instead, and offloading does."""
        return all(
            id(weight) in self._seen
            for weight, parts in trace.uses.items()
            if any(use.reached for calls in parts.values() for use in calls)
        )


def evaluate_again(point: Point, ranks: Ranks = ALONE) -> Point:
    """The point after a move that changed no activation, by a backward alone.

    Activations and loss come from the forward that made `point`. The backward reads the current weights. The new point replaces
    the old one, because it overwrites the old D.

    Raises:
        ValueError: the point was made without `keep_graph`.
    """
    if point.graph is None:
        raise ValueError("this point has no graph; evaluate() it with keep_graph=True.")
    graph = point.graph

    def backward() -> list[Tensor | None]:
        point.trace.forget_gradients()
        return list(torch.autograd.grad(graph, point.parameters, allow_unused=True, retain_graph=True))

    own = ranks.together(backward)
    gradients = ranks.mean_tensors(own, point.parameters)
    length = ranks.mean([norm(gradients)])[0]
    return replace(point, gradients=gradients, own_gradients=own, grad_norm=length)


def loss_at(model: nn.Module, loss_fn: LossFn, batch: Any, *, seed: int, weights: Weights = WHOLE) -> float:
    """The loss on a batch at the current weights, by one forward."""

    def forward() -> float:
        with weights.running():
            return float(loss_fn(model, batch))

    start_afresh(model, seed)
    with torch.no_grad(), keeping_double(model.parameters()):
        return weights.ranks.mean([weights.ranks.together(forward)])[0]


def start_afresh(model: nn.Module, seed: int) -> None:
    """Prepare a forward: clear what was cached from other weights, and set the random seed."""
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
