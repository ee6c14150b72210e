"""A multi-layer perceptron, found in any model by its numbers: linear layers with activations between that have an inverse."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.audit import audit
from hf_teleport.layers.layer import Layer
from hf_teleport.layers.point import Point
from hf_teleport.layers.trace import Use
from hf_teleport.projectors.linear import Linear

# Relative difference up to which features are those that an activation makes, and gradients those that it lets through.
_SAME_FEATURES, _SAME_GRADIENTS = 1e-4, 1e-3

_INVERSES: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.LeakyReLU: lambda act, y: F.leaky_relu(y, 1 / act.negative_slope),
    nn.ELU: lambda act, y: torch.where(y > 0, y, torch.log1p(y / act.alpha)),
    nn.Tanh: lambda act, y: torch.atanh(y),
    nn.Sigmoid: lambda act, y: torch.logit(y),
    nn.Softplus: lambda act, y: y + torch.log(-torch.expm1(-act.beta * y)) / act.beta,
    nn.Identity: lambda act, y: y,
}
"""The inverse of each activation; NaN or infinite outside of its range."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function with an inverse, by the module that computes it."""

    module: nn.Module

    def __call__(self, values: Tensor) -> Tensor:
        return self.module.forward(values.clone())  # it may work in place

    def inverse(self, values: Tensor) -> Tensor:
        """What the function takes to these values; NaN or infinite outside of its range."""
        return _INVERSES[type(self.module)](self.module, values)


@dataclass(frozen=True)
class Perceptron:
    """Linear layers in a chain: each layer reads the activated output of the layer before, and nothing else reads it."""

    layers: list[Layer]
    activations: list[Activation]

    @classmethod
    def find(cls, model: nn.Module, point: Point, config: TeleportConfig) -> "Perceptron":
        """All trainable weights of a model as one chain; what is frozen may lie below and above.

        It is known by its numbers, the features on their way up and the gradients on their way down, and not by its modules.

        Raises:
            ValueError: they are not one.
        """
        layers, reports = audit(model, point, replace(config, target_modules=None, exclude_modules=None))
        used = point.by_parameter
        others = [(report.name, report.reason) for parameter, report in reports.items() if parameter in used and report.reason]
        others += [(v.name, v.role) for v in layers if not isinstance(v.projector, Linear) or v.region.shape != v.weight.shape]
        if others:
            more = f", nor are {len(others) - 1} others" if len(others) > 1 else ""
            raise unsuited(f"{others[0][0]!r} is no such weight ({others[0][1]}){more}")
        for layer in layers:
            calls = point.trace.uses[layer.weight][layer.region]
            if len(calls) > 1:
                raise unsuited(f"{layer.name!r} is used {len(calls)} times in a forward")
            if layer.bias is None and calls[0].call.bias is not None:
                raise unsuited(f"the bias of {layer.name!r} is frozen, or used elsewhere too")
        activations = [_between(lower, upper, model, point) for lower, upper in pairwise(layers)]
        return cls(layers, activations)

    @property
    def matrices(self) -> list[Tensor]:
        """The layers' weights with their biases, detached, in float64."""
        return [layer.matrix({p: p.detach() for p in layer.parameters})[0].double() for layer in self.layers]

    def rows(self, point: Point) -> Tensor:
        """What the first layer read, (N, d), in float64."""
        return self.layers[0].projector.rows(_use(self.layers[0], point).call.input.detach())[0].double()


def _between(lower: Layer, upper: Layer, model: nn.Module, point: Point) -> Activation:
    """The activation between two layers."""
    below, above = _use(lower, point), _use(upper, point)
    outputs = lower.projector.rows(F.linear(below.call.input, below.call.weight, below.call.bias).detach())
    inputs = upper.projector.rows(above.call.input.detach())
    fitting = (a for a in _activations(model) if outputs.shape == inputs.shape and _same(a(outputs), inputs, _SAME_FEATURES))
    activation = next(fitting, None)
    if activation is None:
        leaves = dict.fromkeys(type(m).__name__ for m in model.modules() if next(m.parameters(), None) is None)
        known = f"; the modules without weights are {', '.join(leaves)}" if leaves else ""
        raise unsuited(f"the input of {upper.name!r} is not the output of {lower.name!r} after such an activation{known}")
    if below.output_gradient is not None and above.output_gradient is not None:
        gradient = upper.projector.output_rows(above.output_gradient) @ upper.weight.detach()
        with torch.enable_grad():
            outputs.requires_grad_()
            (let_through,) = torch.autograd.grad(activation(outputs), outputs, gradient)
        if not _same(let_through, lower.projector.output_rows(below.output_gradient), _SAME_GRADIENTS):
            raise unsuited(f"the output of {lower.name!r} goes elsewhere too, and not to {upper.name!r} alone")
    return activation


def _activations(model: nn.Module) -> list[Activation]:
    """The activations that the model may use: its own modules, and defaults for models that call them as functions."""
    modules = [*model.modules(), *(kind() for kind in _INVERSES)]
    known = [m for m in modules if type(m) in _INVERSES and getattr(m, "negative_slope", 1) > 0 and getattr(m, "alpha", 1) > 0]
    # Where all outputs are positive, LeakyReLU looks like the identity, which therefore comes last.
    return sorted(map(Activation, known), key=lambda activation: isinstance(activation.module, nn.Identity))


def _use(layer: Layer, point: Point) -> Use:
    return point.trace.uses[layer.weight][layer.region][0]


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def unsuited(problem: str) -> ValueError:
    """The error for a model that is no chain, with the way out."""
    names = ", ".join(kind.__name__ for kind in _INVERSES)
    return ValueError(
        "method = 'symmetry' is not allowed for this model; allowed: all trainable weights in one chain of linear layers, with "
        f"activations between that have an inverse ({names}). But {problem}. Use method='null_space', which works on any model."
    )
