"""Symmetry teleportation: linear groups that act on adjacent layers (Zhao, Dehmamy, Walters, Yu 2022, arXiv 2205.10637).

In a chain of layers `h_m = act(W_m h_{m-1})` whose activation has an inverse, an element g_m of GL(d_m) acts (equation 8) by

    W_{m+1} -> W_{m+1} g_m⁻¹,        W_m -> W_m + (act⁻¹(g_m act(z)) - z) h⁺,        z = W_m h,   h = h_{m-1}:

h_m becomes `g_m h_m`, and the next layer undoes that. Here h has a column for each sample, and a row of ones if the layer has a
bias, `[W b]`. Where h is square and invertible, as the paper assumes, W_m becomes its `act⁻¹(g_m act(W_m h)) h⁻¹`. The authors'
code puts `h⁺` for `h⁻¹` where there are fewer samples. That gives the batch the same outputs as here, but with it the identity
is no identity: it projects W_m onto the span of h. Here the rest of W_m stays, so that a short step changes little.

No output on the batch changes under two conditions. First, `h⁺ h = I`, which takes at most as many (independent) samples as h
has rows. Second, `g_m act(z)` lies in the range of the activation: everywhere for LeakyReLU, in an interval for Tanh. An action
is made for one batch, and the outputs of other batches change. The teleporter's guard shortens or undoes what goes too far.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.audit import UNUSED, describe, selected
from hf_teleport.layers.layer import Layer
from hf_teleport.layers.point import LossFn, Point, start_afresh
from hf_teleport.methods.base import ClimbingMethod, Move
from hf_teleport.methods.symmetry.perceptron import Activation, Perceptron, unsuited
from hf_teleport.report import LayerReport
from hf_teleport.weights.norms import norm
from hf_teleport.weights.ranks import out_of_memory

_NO_ELEMENT = "no element acts on it: that takes two adjacent layers that may move, of whose biases the lower one's moves"


def group_action(
    elements: list[Tensor | None], matrices: list[Tensor], activations: list[Activation], rows: Tensor
) -> list[Tensor]:
    """Let elements of the linear groups act on a chain of layers, from the input upwards. Differentiable.

    Each layer is acted on with the input that the layers below, already transformed, give it.

    Args:
        elements: g, (o, o), for each layer but the last; None: the identity.
        matrices: W, (o, d), or [W b], (o, d + 1), for each layer.
        activations: for each layer but the last.
        rows: the input of the first layer, (N, d).

    Returns:
        The new matrices. They are not finite where an element leads out of the range of an activation.

    Raises:
        LinAlgError: an element is singular, or the features are not finite.
    """
    moved: list[Tensor] = []
    below: Tensor | None = None
    for matrix, element, activation in zip(matrices, [*elements, None], [*activations, None], strict=True):
        width = rows.shape[1]
        if below is not None:
            weight = torch.linalg.solve(below, matrix[:, :width], left=False)
            matrix = torch.cat([weight, matrix[:, width:]], dim=1)
        inputs = rows if matrix.shape[1] == width else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        if element is not None and activation is not None:
            outputs = inputs @ matrix.mT
            wanted = activation.inverse(activation(outputs) @ element.mT)
            matrix = matrix + (torch.linalg.pinv(inputs) @ (wanted - outputs)).mT
        if activation is not None:
            rows = activation(inputs @ matrix.mT)
        moved.append(matrix)
        below = element
    return moved


class _Loss(nn.Module):
    """A loss function as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


class GroupAction(ClimbingMethod):
    """Ascent of a batch's squared gradient norm `||∇_W L||²` over the elements of the groups, of all adjacent pairs at once.

    A step is `g_m = I + M_m`. With `config.step_size="fixed"`, M is `learning_rate` times the gradient with respect to M at 0, as
    in the paper. With "relative" it has that direction and is `learning_rate` as long as the identity, by the Frobenius norm over
    all pairs: `sqrt(Σ ||M_m||²) = learning_rate * sqrt(Σ d_m)`. An element acts where both layers may move by
    `target_modules` and `exclude_modules`; a bias goes with its weight. Each batch has actions of its own, and the gradient is
    exact, by double backward: `scope`, `hessian`, `energy_threshold` and `objective` are not read. For one process.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.perceptron = Perceptron([], [])
        self._acting: list[bool] = []

    @staticmethod
    def passes(config: TeleportConfig) -> int:
        # Before, at the start of a turn and after; a step is a pass, and one that is differentiated again and charged as two.
        # So is the check of the first batch.
        return 2 + config.num_batches * (3 + 3 * config.steps_per_batch)

    @property
    def movable(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for lower, upper in self._pairs() for p in (*lower.parameters, upper.weight)))

    def _pairs(self) -> Iterator[tuple[Layer, Layer]]:
        """The adjacent layers between which an element acts."""
        return (pair for pair, acting in zip(pairwise(self.perceptron.layers), self._acting, strict=True) if acting)

    def survey(self, point: Point) -> None:
        """See a teleport batch.

        Raises:
            ValueError: the trainable weights are not one chain, or not the same in all batches; an operation cannot be
                differentiated twice; or there are several processes.
        """
        if self.ranks.size > 1:
            raise ValueError(
                f"method = 'symmetry' is not allowed in {self.ranks.size} processes; allowed: in one, for a pseudo-inverse is of "
                "all samples. Use method='null_space', which works in any number."
            )
        perceptron = Perceptron.find(self.model, point, self.config)
        if self.reports:
            if [layer.name for layer in perceptron.layers] != [layer.name for layer in self.perceptron.layers]:
                raise unsuited("another teleport batch goes through other layers")
            return
        self.perceptron = perceptron
        free = [selected(layer.name, layer.role, self.config) for layer in perceptron.layers]
        self._acting = [lower and upper for lower, upper in pairwise(free)]
        self.reports = self._judged(point)
        # Whether the model can be differentiated twice shows here, before training, and not at the first step.
        self.gradients(point)

    def _judged(self, point: Point) -> dict[nn.Parameter, LayerReport]:
        reports = describe(self.model, point, self.config)
        inside = {parameter for layer in self.perceptron.layers for parameter in layer.parameters}
        for parameter, report in reports.items():
            report.reason = report.reason or (_NO_ELEMENT if parameter in inside else UNUSED)
        for lower, upper in self._pairs():
            for layer in (lower, upper):
                reports[layer.weight].movable, reports[layer.weight].reason = True, ""
            if lower.bias is not None:
                del reports[lower.bias]
        num_rows = len(self.perceptron.rows(point))
        for lower, _ in self._pairs():
            width = lower.weight.shape[1] + (lower.bias is not None)
            if num_rows > width:
                reason = f"the loss changes: {num_rows} input rows have no left inverse in {width} dimensions; take fewer samples"
                reports[lower.weight].reason = reason
        return reports

    def propose(self, point: Point) -> Move | None:
        gradients = self.gradients(point)
        length = norm(gradients)
        if length == 0 or not math.isfinite(length):
            return None
        rate = self.config.learning_rate
        if self.config.step_size == "relative":
            rate *= math.sqrt(sum(len(g) for g in gradients if g is not None)) / length
        rows = self.perceptron.rows(point)

        def carry_out(fraction: float) -> None:
            self._act([None if g is None else rate * fraction * g for g in gradients], rows)

        return Move(carry_out, self.snapshot)

    @torch.no_grad()
    def _act(self, generators: list[Tensor | None], rows: Tensor) -> None:
        try:
            moved = self._moved(generators, rows)
        except torch.linalg.LinAlgError:
            # There is no such move. NaN is what the teleporter takes back, to try a shorter one.
            for parameter in self.movable:
                parameter.fill_(math.nan)
            return
        for layer, old, new in zip(self.perceptron.layers, self.perceptron.matrices, moved, strict=True):
            layer.add_((new - old).unsqueeze(0), 1.0)

    def _moved(self, generators: list[Tensor | None], rows: Tensor) -> list[Tensor]:
        """The layers' matrices after `I + M` has acted for each M."""
        elements = [None if m is None else torch.eye(len(m)).to(m) + m for m in generators]
        return group_action(elements, self.perceptron.matrices, self.perceptron.activations, rows)

    def gradients(self, point: Point) -> list[Tensor | None]:
        """The gradient of `||∇_W L||²` with respect to M at `M = 0`, (d_m, d_m), for each adjacent pair; None where none acts.

        NaN where an activation is saturated, so that its inverse does not find the way back.

        Raises:
            ValueError: an operation of the model cannot be differentiated twice.
        """
        rows = self.perceptron.rows(point)
        generators = [
            rows.new_zeros(layer.weight.shape[0], layer.weight.shape[0], requires_grad=True) if acting else None
            for layer, acting in zip(self.perceptron.layers, self._acting, strict=False)
        ]
        wanted = [m for m in generators if m is not None]
        if not wanted:
            return generators
        with torch.enable_grad():
            try:
                values = self._values(self._moved(generators, rows))
            except torch.linalg.LinAlgError:
                return [None if m is None else torch.full_like(m, math.nan) for m in generators]
            named = {f"model.{name}": values[p] for name, p in self.model.named_parameters() if p in values}
            start_afresh(self.model, point.seed)
            loss = torch.func.functional_call(_Loss(self.model, self.loss_fn), named, (point.batch,))
            try:
                first = torch.autograd.grad(loss, list(values.values()), create_graph=True)
                found = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), wanted)
            except (RuntimeError, NotImplementedError) as error:
                if out_of_memory(error):
                    raise
                raise ValueError(
                    f"method = 'symmetry' needs operations that can be differentiated twice ({error}); use method='null_space'."
                ) from error
        gradients = iter(found)
        return [None if m is None else next(gradients) for m in generators]

    def _values(self, matrices: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        """The weights and biases that matrices of the layers hold, to be differentiated with respect to."""
        values: dict[nn.Parameter, Tensor] = {}
        for layer, matrix in zip(self.perceptron.layers, matrices, strict=True):
            weight, bias = matrix.tensor_split([layer.weight.shape[1]], dim=1)
            values[layer.weight] = weight.to(layer.weight)
            if layer.bias is not None:
                values[layer.bias] = bias.squeeze(1).to(layer.bias)
        return {p: value if value.requires_grad else value.requires_grad_() for p, value in values.items()}
