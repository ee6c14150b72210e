"""Level set teleportation: sequential quadratic programming with the loss linearised (Mishkin, Bietti, Gower, arXiv 2403.03362).

`max_w log ||∇f(w)||` subject to `f(w) = f(w_0)`. At w, with the gradient g and the objective's gradient `q = H g / ||g||²`, the
step of rate rho maximises `<q, d> - ||d||² / (2 rho)` subject to `f(w) + <g, d> = f(w_0)`, which has the closed form

    d = rho t - (f(w) - f(w_0)) / ||g||² g,        t = q - lambda g,        lambda = <q, g> / ||g||²:

along the tangent of the level set, and one Newton step back to it. Lambda is the constraint's multiplier. With several losses
to keep, g is their Jacobian, and `||g||²` its Gram matrix. All weights move, also those whose inputs have no null space; but
the losses are kept to first order only, and a line search shortens rho.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.audit import UNUSED, describe
from hf_teleport.layers.hessian import hessian_vector_product
from hf_teleport.layers.point import Point, evaluate, loss_at
from hf_teleport.methods.base import ClimbingMethod, Move
from hf_teleport.weights.norms import norm
from hf_teleport.weights.snapshot import Snapshot

# Relative: the sine of the angle between q and the span of g, and the distance of a loss from its level. The authors' code takes
# the same numbers as absolute ones, for ||t|| and for the loss.
_STATIONARY, _ON_LEVEL = 1e-4, 1e-6

# Of the merit that the linearisation predicts, a step must gain this share; otherwise rho is halved, this many times.
_SUFFICIENT = 0.5
_HALVINGS = 8

# The penalty exceeds the largest multiplier by this factor.
_ABOVE_MULTIPLIER = 2


@dataclass
class LinearisedStep:
    """A step of any rate from one point, `d = rho t - back`, over the parameters that move.

    Attributes:
        tangent: t, for each parameter.
        back: the shortest step that brings the linearised losses to their levels, for each parameter.
        multipliers: lambda, for each loss.
        excesses: f(w) - f(w_0), for each loss.
        slope: `||t||²`, what the objective gains for each unit of rho.
        stationary: whether t is negligible beside the objective's gradient: no step along the level set gains, to first order.
    """

    parameters: list[nn.Parameter]
    tangent: list[Tensor]
    back: list[Tensor]
    multipliers: list[float]
    excesses: list[float]
    slope: float
    stationary: bool

    @torch.no_grad()
    def add(self, rho: float, fraction: float = 1.0) -> None:
        """Add `fraction * d` to the parameters."""
        for parameter, tangent, back in zip(self.parameters, self.tangent, self.back, strict=True):
            parameter.add_(tangent, alpha=fraction * rho).sub_(back, alpha=fraction)

    def penalty(self) -> float:
        """A gamma for which d is an ascent direction of the merit function: more than any multiplier's size.

        For an exact penalty function it is the usual rule (Nocedal and Wright, Numerical Optimization, theorem 18.2). That of the
        authors' code is in proportion to `<q, g> (rho <q, g> + excess) / |excess|`, which has no limit as the excess vanishes.
        """
        return _ABOVE_MULTIPLIER * max(map(abs, self.multipliers))

    def predicted(self, rho: float, gamma: float) -> float:
        """The derivative along d of the merit function."""
        back = sum(multiplier * excess for multiplier, excess in zip(self.multipliers, self.excesses, strict=True))
        return rho * self.slope - back + gamma * sum(map(abs, self.excesses))


def linearised_step(
    parameters: list[nn.Parameter], objective: list[Tensor], jacobian: list[list[Tensor]], excesses: list[float]
) -> LinearisedStep:
    """The step that the linearised constraints allow.

    Args:
        objective: q, the gradient of the objective, for each parameter.
        jacobian: for each loss, its gradient g for each parameter. A gradient that depends linearly on the others, up to the
            precision of the weights, adds no constraint.
        excesses: f(w) - f(w_0), for each loss.
    """
    gram = torch.zeros(len(jacobian), len(jacobian), dtype=torch.float64)
    for (i, a), (j, b) in combinations_with_replacement(enumerate(jacobian), 2):
        gram[i, j] = gram[j, i] = _inner(a, b)
    inverse = torch.linalg.pinv(gram, rtol=len(gram) * torch.finfo(objective[0].dtype).eps, hermitian=True)
    along = torch.tensor([_inner(objective, gradients) for gradients in jacobian], dtype=torch.float64)
    multipliers = (inverse @ along).tolist()
    shares = (inverse @ torch.tensor(excesses, dtype=torch.float64)).tolist()
    tangent, back = [], []
    for i, q in enumerate(objective):
        tangent.append(q.clone())
        back.append(torch.zeros_like(q))
        for gradients, multiplier, share in zip(jacobian, multipliers, shares, strict=True):
            tangent[i].sub_(gradients[i], alpha=multiplier)
            back[i].add_(gradients[i], alpha=share)
    length = norm(tangent)
    return LinearisedStep(
        parameters, tangent, back, multipliers, excesses, length**2, stationary=length <= _STATIONARY * norm(objective)
    )


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    products = [(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return float(torch.stack([product.to(products[0].device) for product in products]).sum())


def merit(grad_norm: float, violation: float, gamma: float) -> float:
    """`log ||∇f(w)|| - gamma |f(w) - f(w_0)|`, the violation of several constraints being the sum of theirs."""
    return (math.log(grad_norm) if grad_norm else -math.inf) - gamma * violation


class LevelSet(ClimbingMethod):
    """Ascent of a batch's gradient norm along the level set of the loss, in all weights.

    With `config.scope="joint"` a step keeps the loss of every teleport batch, which takes a gradient of each. With "batch" it
    keeps only the loss of its own batch, as the authors do, and later batches change the loss of earlier ones. The levels are the
    losses before the event. A turn ends by itself if the first-order conditions hold, or no step gains.

    `config.learning_rate` is the longest rho that a line search tries. With `step_size="fixed"` it is rho itself. With "relative"
    it makes a step along the tangent as long as that share of the norm of the weights that may move. Searches begin there, and
    later ones at most at twice the last accepted value. They accept a step that gains half of what the linearisation predicts of
    the merit function, and keeps each of these losses within `config.max_loss_change`, beyond which it would be undone.

    The objective is the paper's and `H g` is exact: `config.objective`, `hessian` and `energy_threshold` are not read.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._batches: dict[int, tuple[Any, float]] = {}
        self._gammas: dict[int, float] = {}
        self._share = 1.0

    @staticmethod
    def passes(config: TeleportConfig) -> int:
        # One pass is a check. Each batch takes three: before the event, at the start of its turn, and after the event. A step is
        # a pass, a double backward and a line search. Each other loss that it keeps takes a pass, and a forward for each trial,
        # which counts as a pass.
        kept = config.num_batches if config.scope == "joint" else 1
        return 1 + config.num_batches * (3 + config.steps_per_batch * (1 + kept * (_HALVINGS + 2)))

    @property
    def movable(self) -> list[nn.Parameter]:
        return [parameter for parameter, report in self.reports.items() if report.movable]

    def evaluate(self, batch: Any, seed: int) -> Point:
        return evaluate(self.model, self.loss_fn, batch, seed=seed, differentiable_gradients=True, weights=self.weights)

    def survey(self, point: Point) -> None:
        if not self.reports:
            # Whether the model can be differentiated twice shows here, before training, and not at the first step.
            self._bend(point)
            self.reports = self.ranks.together(lambda: describe(self.model, point, self.config))
        for parameter, gradient in zip(point.parameters, point.gradients, strict=True):
            report = self.reports[parameter]
            if gradient is not None and report.reason in ("", UNUSED):
                report.movable, report.reason = True, ""
            elif not report.movable:
                report.reason = report.reason or UNUSED
        self._batches[point.seed] = point.batch, point.loss

    def _bend(self, point: Point) -> list[Tensor | None]:
        """`H g`, the mean over all processes."""
        own = self.ranks.together(lambda: hessian_vector_product(point, point.gradients))
        return self.ranks.mean_tensors(own, point.parameters)

    def propose(self, point: Point) -> Move | None:
        products = self._bend(point)
        losses, jacobian = [], []
        for seed in self._kept(point):
            loss, gradients = (point.loss, point.gradients) if seed == point.seed else self._gradients(seed)
            losses.append(loss)
            jacobian.append(gradients)
        step = self.ranks.together(lambda: self._linearised(point, products, losses, jacobian))
        if step is None or (step.stationary and self._on_level(point, losses)):
            return None
        rho = self._search(point, step)
        return None if rho is None else Move(partial(step.add, rho), self.snapshot, straight=True)

    def _kept(self, point: Point) -> list[int]:
        """The batches whose losses a step keeps, by their seeds; the point's own first."""
        others = self._batches if self.config.scope == "joint" else ()
        return [point.seed, *(seed for seed in others if seed != point.seed)]

    def _gradients(self, seed: int) -> tuple[float, list[Tensor | None]]:
        """Loss and gradients of a surveyed batch; what else its point holds may go."""
        point = super().evaluate(self._batches[seed][0], seed)
        return point.loss, point.gradients

    def _on_level(self, point: Point, losses: list[float]) -> bool:
        levels = [self._batches[seed][1] for seed in self._kept(point)]
        return all(abs(loss - level) <= _ON_LEVEL * abs(level) for loss, level in zip(losses, levels, strict=True))

    def _linearised(
        self, point: Point, products: list[Tensor | None], losses: list[float], jacobian: list[list[Tensor | None]]
    ) -> LinearisedStep | None:
        """None: the batch has no gradient, or something is not finite."""
        movable = set(self.movable)
        chosen = [(i, p) for i, p in enumerate(point.parameters) if p in movable and point.gradients[i] is not None]
        if not chosen or not point.grad_norm:
            return None

        def of_chosen(tensors: list[Tensor | None]) -> list[Tensor]:
            return [torch.zeros_like(p) if tensors[i] is None else tensors[i].detach() for i, p in chosen]  # type: ignore[union-attr]

        objective = [product / point.grad_norm**2 for product in of_chosen(products)]
        gradients = [of_chosen(tensors) for tensors in jacobian]
        if not all(math.isfinite(norm(tensors)) for tensors in (objective, *gradients)):
            return None
        excesses = [loss - self._batches[seed][1] for loss, seed in zip(losses, self._kept(point), strict=True)]
        return linearised_step([p for _, p in chosen], objective, gradients, excesses)

    def _search(self, point: Point, step: LinearisedStep) -> float | None:
        """A rate that the merit function accepts, halved until it does; None if none is."""
        gamma = self._gammas[point.seed] = max(self._gammas.get(point.seed, 0.0), step.penalty())
        snapshot = self.ranks.together(lambda: Snapshot(step.parameters))
        if step.stationary:  # nothing is left of t but rounding: only back to the level
            return 0.0 if self._gains(point, step, 0.0, gamma, snapshot) else None
        longest = self.config.learning_rate
        if self.config.step_size == "relative":
            longest *= norm(self.movable) / math.sqrt(step.slope)
        share = min(1.0, 2 * self._share)
        for _ in range(_HALVINGS + 1):
            if self._gains(point, step, share * longest, gamma, snapshot):
                self._share = share
                return share * longest
            share /= 2
        return None

    def _gains(self, point: Point, step: LinearisedStep, rho: float, gamma: float, snapshot: Snapshot) -> bool:
        """Whether a step of this rate does what it must; the weights are afterwards what they were."""
        needed = merit(point.grad_norm, sum(map(abs, step.excesses)), gamma) + _SUFFICIENT * step.predicted(rho, gamma)
        violation = 0.0
        try:
            self.ranks.together(partial(step.add, rho))
            trial = super().evaluate(point.batch, point.seed)  # nobody differentiates its gradients
            if not trial.finite:
                return False
            for seed in self._kept(point):
                batch, level = self._batches[seed]
                own = seed == point.seed
                loss = trial.loss if own else loss_at(self.model, self.loss_fn, batch, seed=seed, weights=self.weights)
                violation += abs(loss - level)
                # The violation only grows: what it is so far may be too much.
                if not (self.config.allows(loss, level) and merit(trial.grad_norm, violation, gamma) >= needed):
                    return False
            return True
        finally:
            snapshot.restore()
