"""One teleport event: measure, ascend under a guard, measure again, and undo it all if it did harm.

Knows neither the Trainer nor the schedule, and not which method runs.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_teleport.ascent import LossFn, Point, norm
from hf_teleport.config import TeleportConfig
from hf_teleport.isolation import Snapshot, evaluation_mode, full_precision, preserved_rng
from hf_teleport.methods import METHODS, Method, Move
from hf_teleport.report import LayerReport, SymmetryReport, TeleportReport

logger = logging.getLogger(__name__)

_NO_DIRECTION = "its direction is zero: no trainable weight lies below it, or no gradient reaches its output"

_NO_STEP = {
    "no_direction": "no layer has a direction; a model of one layer has none, nor has fresh LoRA (B = 0): teleport it later",
    "non_finite": "the loss or its gradient is not finite on the teleport data; check that data, and the learning rate",
    "max_loss_change": "every step changed the loss by more than max_loss_change; lower the teleport learning_rate, or raise it",
    "grad_norm_cap": "the gradient norm is above grad_norm_cap already; raise it to go further",
    "not_a_symmetry": "what was turned changes the model's gradients otherwise than a symmetry would; please report this model",
    "max_growth": "every step overshot max_growth; lower the teleport learning_rate",
}

# A step that meets an objection is tried again at half its length this many times before the batch's turn ends.
_HALVINGS = 4

# A step may pass `max_growth` by this factor; one that jumps further is too long to trust.
_OVERSHOOT = 1.1


@dataclass
class _Measurement:
    """The teleport data at one setting of the weights: loss and gradient norm of each batch, and of all together."""

    losses: list[float]
    grad_norms: list[float]
    grad_norm: float

    def first(self) -> "_Measurement":
        """That of the first batch alone."""
        return _Measurement(self.losses[:1], self.grad_norms[:1], self.grad_norms[0])

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Check:
    """What a teleport could do, found out without moving anything.

    Attributes:
        loss: on the batch, which may not be finite.
        layers: a report for every weight; empty if the loss is not finite.
        symmetries: for a method that turns symmetries, each that was found.
        blocking: norm gains that must stay uniform if the residual stream is to turn.
    """

    loss: float
    layers: list[LayerReport]
    symmetries: list[SymmetryReport]
    blocking: list[nn.Parameter]

    def require_movable(self) -> None:
        """Raise if the batch was judged, and no weight may move.

        Raises:
            ValueError: with the most frequent reasons.
        """
        if self.layers and not any(layer.movable for layer in self.layers):
            raise ValueError(f"{_why_immovable(self.layers)}.")


class Teleporter:
    """Teleports any `nn.Module` with any scalar loss.

    Args:
        model: its parameters with `requires_grad` are teleported, in place.
        config: the settings; `epochs`, `warmup_steps` and `batch_size` are for the trainer and are not read here.
        optimizer: the one that trains the model. A change of basis turns its state along; without it only the weights turn.
        progress: called after each step with the number of steps taken and the most there can be.

    Example:
        >>> report = Teleporter(model, TeleportConfig()).teleport(batches, lambda model, batch: model(**batch).loss)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TeleportConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
        optimizer: Any = None,
    ):
        self.model = model
        self.config = config or TeleportConfig()
        self.optimizer = optimizer
        self._progress = progress or (lambda step, total: None)

    def teleport(self, batches: Iterable[Any], loss_fn: LossFn) -> TeleportReport:
        """Move the weights inside the level set of the loss on these batches (Algorithm 1 of the paper).

        Modes, buffers, gradients and random states are afterwards what they were. Whatever goes wrong, the weights
        are either teleported within `max_loss_change`, or bit for bit what they were.

        Args:
            batches: whatever `loss_fn` takes; all of them are used, `config.num_batches` is for the trainer.
            loss_fn: `loss_fn(model, batch)` gives the mean loss of a batch, a scalar.

        Returns:
            What was done, for each layer too.

        Raises:
            ValueError: no batch, a loss that is no scalar or has no gradient, or a target module that matches nothing. The
                weights are untouched.
        """
        start = time.perf_counter()
        with preserved_rng(), evaluation_mode(self.model), full_precision(self.model):
            batches = list(batches)
            if not batches:
                raise ValueError("there are no teleport batches: pass at least one batch of data to teleport on.")
            method = self._method(loss_fn)
            before = self._measure(method, batches, method.survey)
            if not before.finite:
                _explain(method, set(), 0, "non_finite")
                return self._report(method, before, before, 0, "non_finite", start)
            method.fit()
            if not method.movable:
                _explain(method, set(), 0, "nothing_movable")
                return self._report(method, before, before, 0, "nothing_movable", start)
            snapshot = method.snapshot()
            try:
                steps, reason = self._jump(method) if method.once else self._ascend(method, batches, before)
                if method.once and not method.reviews_all:  # it holds for every input, so one batch tells
                    batches, before = batches[:1], before.first()
                after = self._measure(method, batches, method.review) if steps else before
                accepted = after.finite and self._within(after.loss, before.loss) and not method.objection
            except BaseException:
                snapshot.restore()
                raise
            if accepted:
                method.accept()
            else:
                snapshot.restore()
                reason = method.objection or ("max_loss_change" if after.finite else "non_finite")
                steps, after = 0, before
            _explain(method, snapshot.changed(), steps, reason)
            return self._report(method, before, after, steps, reason, start, undone=not accepted)

    def check(self, batch: Any, loss_fn: LossFn) -> Check:
        """What a teleport on this batch could move, without moving anything.

        Raises:
            ValueError: as `teleport`; `Check.require_movable` raises if nothing may move.
        """
        with preserved_rng(), evaluation_mode(self.model), full_precision(self.model):
            method = self._method(loss_fn)
            point = method.evaluate(batch, self.config.seed)
            if point.finite:
                method.survey(point)
            return Check(point.loss, list(method.reports.values()), method.symmetries, method.blocking)

    def _method(self, loss_fn: LossFn) -> Method:
        return METHODS[self.config.method](self.model, loss_fn, self.config, self.optimizer)

    def _measure(self, method: Method, batches: list[Any], see: Callable[[Point], None] = lambda point: None) -> _Measurement:
        losses, grad_norms = [], []
        total: list[Tensor | None] = []
        for i, batch in enumerate(batches):
            point = method.evaluate(batch, self.config.seed + i)
            losses.append(point.loss)
            grad_norms.append(point.grad_norm)
            total = _sum(total, point.gradients)
            if not point.finite:
                break
            see(point)
        return _Measurement(losses, grad_norms, norm(total) / len(losses))

    def _jump(self, method: Method) -> tuple[int, str]:
        """The one move of a method that makes but one. Returns the number of moves, and why there is no other."""
        move = method.propose()
        if move is None:
            return 0, "aligned"
        move(1.0)
        self._progress(1, 1)
        return 1, "steps_done"

    def _ascend(self, method: Method, batches: list[Any], before: _Measurement) -> tuple[int, str]:
        """The steps on every batch in turn. Returns how many were kept, and why most of the turns ended."""
        steps, total = 0, len(batches) * self.config.steps_per_batch
        endings: Counter[str] = Counter()
        for i, batch in enumerate(batches):
            point = method.evaluate(batch, self.config.seed + i)
            method.begin(point)
            ending = ""
            for _ in range(self.config.steps_per_batch):
                if ending := self._limit(point, before.grad_norms[i]):
                    break
                move = method.propose(point)
                if move is None:
                    ending = "no_direction"
                    break
                reached, ending = self._carry_out(move, method, point, before.losses[i], before.grad_norms[i])
                if reached is None:
                    break
                point = reached
                steps += 1
                self._progress(steps, total)
            endings[ending or "steps_done"] += 1
        return steps, endings.most_common(1)[0][0]

    def _carry_out(self, move: Move, method: Method, point: Point, loss: float, grad_norm: float) -> tuple[Point | None, str]:
        """Make a move, shortened until there is no objection. None and the last objection: it was undone.

        Args:
            loss, grad_norm: of the point's batch before the event.
        """
        snapshot = Snapshot(method.movable)
        objection = ""
        for halving in range(_HALVINGS + 1):
            move(0.5**halving)
            reached = method.evaluate(point.batch, point.seed)
            objection = self._objection(reached, loss, grad_norm)
            if not objection:
                return reached, ""
            snapshot.restore()
        return None, objection

    def _objection(self, point: Point, loss: float, grad_norm: float) -> str:
        growth = self.config.max_growth
        if not point.finite:
            return "non_finite"
        if not self._within(point.loss, loss):
            return "max_loss_change"
        if growth is not None and point.grad_norm > _OVERSHOOT * growth * grad_norm:
            return "max_growth"
        return ""

    def _within(self, loss: float, reference: float) -> bool:
        limit = self.config.max_loss_change
        return limit is None or abs(loss - reference) <= limit * abs(reference)

    def _limit(self, point: Point, start: float) -> str:
        """Why to end a batch's turn before another step; empty: go on."""
        cap, growth = self.config.grad_norm_cap, self.config.max_growth
        if cap is not None and point.grad_norm >= cap:
            return "grad_norm_cap"
        if growth is not None and point.grad_norm >= growth * start:
            return "max_growth"
        return ""

    def _report(
        self,
        method: Method,
        before: _Measurement,
        after: _Measurement,
        steps: int,
        reason: str,
        start: float,
        undone: bool = False,
    ) -> TeleportReport:
        report = TeleportReport(
            method=self.config.method,
            loss_before=before.loss,
            loss_after=after.loss,
            grad_norm_before=before.grad_norm,
            grad_norm_after=after.grad_norm,
            steps=steps,
            stopped_because=reason,
            rolled_back=undone,
            seconds=time.perf_counter() - start,
            layers=list(method.reports.values()),
            symmetries=method.symmetries,
        )
        if not steps and reason != "aligned":
            spanned = Counter(layer.reason for layer in report.layers if layer.movable and layer.null_dim == 0)
            why = spanned.most_common(1)[0][0] if reason == "no_direction" and spanned else _NO_STEP.get(reason, reason)
            why = _why_immovable(report.layers) if reason == "nothing_movable" else why
            logger.warning("The teleport changed nothing: %s.", why)
        return report


def _explain(method: Method, changed: set[nn.Parameter], steps: int, reason: str) -> None:
    """Note in each report whether its weight moved, and if not, why."""
    for parameter, report in method.reports.items():
        report.moved = parameter in changed
        if report.moved:
            report.reason = ""
        elif not report.reason:
            report.reason = _NO_DIRECTION if steps else f"no step was kept ({reason})"


def _why_immovable(layers: Iterable[LayerReport]) -> str:
    reasons = Counter(layer.reason for layer in layers)
    shown = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
    return f"no weight of the model can be teleported. Reasons, with the number of weights: {shown}"


def _sum(total: list[Tensor | None], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients added up parameter by parameter; None counts as zero."""
    if not total:
        return [None if g is None else g.detach() for g in gradients]
    return [t if g is None else g.detach() if t is None else t + g.detach() for t, g in zip(total, gradients, strict=True)]
