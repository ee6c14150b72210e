"""One teleport event: measure, move under a guard, measure again, and undo it all if it did harm."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from hf_teleport.event.climb import Climb, turn
from hf_teleport.event.guard import Guard
from hf_teleport.event.measurement import Measurement, landing, measure
from hf_teleport.event.reasons import explain, why_unmoved
from hf_teleport.event.verdict import held_back_loss, shorten, verdict
from hf_teleport.methods import ClimbingMethod, TurningMethod
from hf_teleport.optimizers.state import forget
from hf_teleport.report import TeleportReport

logger = logging.getLogger(__name__)


class Event:
    """An event of one method. It knows of the method only its family.

    Args:
        method: new for this event.
        progress: called after each step with the number of steps taken and the most there can be.
        start: `time.perf_counter()` when the event began.
    """

    def __init__(self, method: ClimbingMethod | TurningMethod, progress: Callable[[int, int], None], start: float):
        self._method = method
        self._config = method.config
        self._weights = method.weights
        self._ranks = method.ranks
        self._progress = progress
        self._start = start

    def run(self, batches: list[Any], held_back: Any = None) -> TeleportReport:
        """Carry out the event on these batches. If an error occurs, the weights are bit for bit what they were.

        Args:
            held_back: a batch that takes no part, and whose loss is watched; None: there is none.
        """
        method = self._method
        before = measure(method, batches, method.survey)
        if not before.finite:
            return self._report(before, before, 0, "non_finite", {})
        method.fit()
        if not method.movable:
            return self._report(before, before, 0, "nothing_movable", {})
        watched = held_back_loss(method, held_back)
        usual = landing(method, batches, held_back)
        snapshot = self._ranks.together(method.snapshot)
        try:
            if isinstance(method, TurningMethod):
                steps, reason = turn(method, self._progress)
            else:
                steps, reason = Climb(method, Guard(self._config), self._progress).run(batches, before, snapshot)
            objection = shorten(method, snapshot, watched, held_back) if steps else ""
            review = method.review if isinstance(method, TurningMethod) else None
            after = measure(method, batches, review) if steps else before
            if steps and self._ranks.together(self._weights.round):
                after = measure(method, batches)
            objection = objection or verdict(method, before, after)
            if steps and not objection and usual is not None:
                forgotten = method.movable if self._config.optimizer_state == "reset" else []
                landed = landing(method, batches, held_back, forgotten)
                objection = "" if landed is not None and landed < usual else "no_better"
            changed = snapshot.changed(self._weights)
            rehearsed = bool(steps) and self._config.control == "matched_rate"
            if not objection and not rehearsed:
                with ExitStack() as stack:
                    self._ranks.together(lambda: stack.enter_context(method.undone_on_error()))
                    self._keep()
        except BaseException:
            snapshot.restore()
            raise
        if objection:
            snapshot.restore()
            return self._report(before, before, 0, objection, {}, undone=True)
        if rehearsed:
            snapshot.restore()
            return self._report(before, after, steps, "matched_rate", {}, undone=True)
        return self._report(before, after, steps, reason, changed)

    def _keep(self) -> None:
        """The event stands: the optimizer learns of it, and every process gets the weights of the first."""
        if isinstance(self._method, TurningMethod):
            self._ranks.together(self._method.accept)
        self._ranks.broadcast(self._method.written)
        # Last, for it is not undone.
        if self._method.optimizer is not None and self._config.optimizer_state == "reset":
            forget(self._method.optimizer, self._method.movable, self._weights.origin)

    def _report(
        self,
        before: Measurement,
        after: Measurement,
        steps: int,
        reason: str,
        changed: dict[nn.Parameter, float | None],
        undone: bool = False,
    ) -> TeleportReport:
        method = self._method
        explain(method.reports, changed, steps, reason, method.at_rest)
        report = TeleportReport(
            method=self._config.method,
            loss_before=before.loss,
            loss_after=after.loss,
            grad_norm_before=before.grad_norm,
            grad_norm_after=after.grad_norm,
            steps=steps,
            stopped_because=reason,
            rolled_back=undone,
            seconds=time.perf_counter() - self._start,
            layers=list(method.reports.values()),
            symmetries=method.symmetries if isinstance(method, TurningMethod) else [],
        )
        if not steps and reason != "aligned" and self._ranks.rank == 0:
            logger.warning("The teleport changed nothing: %s.", why_unmoved(report))
        return report
