"""The objectives that a teleport climbs: values of the loss near the weights, and their gradients inside the level set.

The gradient of each is `H v + p`. H is the Hessian of the batch's loss, and `H v` is the part that reaches the value through the
loss gradient g. The plain gradient p is the part that reaches it through the weights themselves. A projected `H v` costs one
forward (direction.py), so no objective differentiates anything twice. docs/mathematics.md derives v and p of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_teleport.layers.point import Point
from hf_teleport.layers.shift import shifted
from hf_teleport.optimizers.rehearsal import Rehearsal
from hf_teleport.weights.norms import norm

Gradients = list[Tensor | None]


@dataclass
class Slope:
    """An objective at a point, and its gradient there, `H along + plain`.

    Attributes:
        value: of the objective.
        along: v, for each parameter; None: no such part.
        plain: p, for each parameter; None: no such part.
        length: the norm of v, if it is known.
    """

    value: float
    along: Gradients | None = None
    plain: Gradients | None = None
    length: float | None = None


@dataclass
class Surroundings:
    """What an objective may look at besides the point itself.

    Attributes:
        parameters: all that are trained, in the order of a point's gradients.
        evaluate: loss and gradients on a batch where the weights are.
        another: the teleport batch after a given one, and its seed.
        rehearsal: the optimizer's next steps; None if the teleport knows of no optimizer.
        radius: how far to look around, as a share of the weights' norm.
        seed: of random directions.
    """

    parameters: list[nn.Parameter]
    evaluate: Callable[[Any, int], Point]
    another: Callable[[Any], tuple[Any, int]]
    rehearsal: Rehearsal | None = None
    radius: float = 0.05
    seed: int = 0

    def shifted_by(self, direction: Gradients, length: float, point: Point) -> Point:
        """Loss and gradients on the point's batch with the weights shifted along a direction."""
        with shifted(self.parameters, direction, length):
            return self.evaluate(point.batch, point.seed)


class Objective(ABC):
    """A function of the weights that a teleport makes as large as it can.

    Attributes:
        searched: whether a step must raise it, and is shortened until it does. The paper's objective is climbed unlooked.
        needs_optimizer: whether it is about the optimizer's next step.
        passes: forward and backward passes that a slope costs beyond the one that made the point.
        copies: how many times the size of the weights an event with this objective holds, at most.
    """

    searched: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    copies: ClassVar[int] = 4  # to undo the event, the gradient, the move or what undoes it, and what a forward shifts

    def __init__(self, surroundings: Surroundings):
        self.around = surroundings
        if self.needs_optimizer and surroundings.rehearsal is None:
            raise ValueError(
                f"objective {type(self).__name__} is about the optimizer's next step, and none was given; pass "
                "Teleporter(..., optimizer=optimizer), or use objective='grad_norm'."
            )
        # Any: it is there where it is needed.
        self.rehearsal: Any = surroundings.rehearsal

    @abstractmethod
    def slope(self, point: Point) -> Slope:
        """Value and gradient where the weights are; `point` was made there."""


class GradNorm(Objective):
    """`½ ||g||²`, the paper's objective: v = g."""

    searched = False

    def slope(self, point: Point) -> Slope:
        return Slope(0.5 * point.grad_norm**2, along=_detached(point.gradients), length=point.grad_norm)


class PredictedDecrease(Objective):
    """`<g, u>`, the decrease of the loss that the optimizer's own next step `-u` predicts: v = u, held fixed.

    For gradient descent this is the paper's objective. An optimizer that rescales g has another measure: Adam's first step is
    `lr sign(g)`, so the objective is `||g||_1`.
    """

    needs_optimizer = True
    copies = 6

    def slope(self, point: Point) -> Slope:
        gradients = _detached(point.gradients)
        along = _scaled(self.rehearsal.step(self.around.parameters, gradients), -1)
        return Slope(_inner(gradients, along), along)


class Lookahead(Objective):
    """`-L_B(W + s(g_A(W)))`: minus the loss of another batch B after the optimizer's next step s on this batch A.

    With g' the gradient of B after the step, `p = -g'` and `v = -(∂s/∂g)ᵀ g'`, which for gradient descent is `lr g'`.
    """

    needs_optimizer = True
    passes = 1
    copies = 8

    def slope(self, point: Point) -> Slope:
        parameters, rehearsal = self.around.parameters, self.rehearsal
        gradients = _detached(point.gradients)
        step = rehearsal.step(parameters, gradients)
        with shifted(parameters, step, 1.0):
            landed = self.around.evaluate(*self.around.another(point.batch))
        loss, plain = landed.loss, _scaled(_detached(landed.gradients), -1)
        del step, landed  # as large as the weights
        return Slope(-loss, rehearsal.pull_back(parameters, gradients, plain), plain)


class Sharpness(Objective):
    """`-mean L(W + d)` over random d of one length, minus the sharpness of arXiv 2305.13404: `p = -mean ∇L(W + d)`.

    The directions come in pairs d, -d and are the same for every step on a batch.
    """

    _PAIRS = 2
    passes = 2 * _PAIRS
    copies = 8

    def slope(self, point: Point) -> Slope:
        parameters = self.around.parameters
        generator = torch.Generator().manual_seed(self.around.seed + point.seed)
        losses, total = 0.0, [torch.zeros_like(p) for p in parameters]
        for _ in range(self._PAIRS):
            noise: Gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) for p in parameters]
            length = self.around.radius * norm(parameters) / norm(noise)
            for sign in (1, -1):
                there = self.around.shifted_by(noise, sign * length, point)
                losses += there.loss
                for sum_, gradient in zip(total, _detached(there.gradients), strict=True):
                    if gradient is not None:
                        sum_ += gradient
        count = 2 * self._PAIRS
        return Slope(-losses / count, plain=[t.div_(-count) for t in total])


class Curvature(Objective):
    """Minus the curvature along the gradient, `uᵀ H u` with `u = g / ||g||`, as the second difference of the loss at `W ± e u`.

    With `g± = ∇L(W ± e u)` and `w = (g+ - g-) / e`: `p = -(g+ + g- - 2 g) / e²` and `v = -(w - <w, u> u) / ||g||`.
    """

    passes = 2
    copies = 10

    def slope(self, point: Point) -> Slope:
        gradients = _detached(point.gradients)
        if not point.grad_norm:
            return Slope(0.0)
        unit = _scaled(gradients, 1 / point.grad_norm)
        e = self.around.radius * norm(self.around.parameters)
        ahead, behind = (self.around.shifted_by(unit, sign * e, point) for sign in (1, -1))
        value = (ahead.loss + behind.loss - 2 * point.loss) / e**2
        plain: Gradients = []
        turning: Gradients = []
        for g, plus, minus in zip(gradients, _detached(ahead.gradients), _detached(behind.gradients), strict=True):
            known = g is not None and plus is not None and minus is not None
            plain.append((plus + minus - 2 * g) / -(e**2) if known else None)  # type: ignore[operator]
            turning.append((plus - minus) / e if known else None)  # type: ignore[operator]
        along_unit = _inner(turning, unit)
        along: Gradients = [
            None if w is None or u is None else (w - along_unit * u) / -point.grad_norm
            for w, u in zip(turning, unit, strict=True)
        ]
        return Slope(-value, along, plain)


OBJECTIVES: dict[str, type[Objective]] = {
    "grad_norm": GradNorm,
    "predicted_decrease": PredictedDecrease,
    "lookahead": Lookahead,
    "sharpness": Sharpness,
    "curvature": Curvature,
}


def _detached(gradients: Gradients) -> Gradients:
    return [None if g is None else g.detach() for g in gradients]


def _scaled(tensors: Gradients, factor: float) -> Gradients:
    return [None if t is None else t * factor for t in tensors]


def _inner(first: Gradients, second: Gradients) -> float:
    return sum(float((a * b).sum()) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
