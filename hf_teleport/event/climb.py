"""The steps of an event: a climb on each batch in turn, or a single turn. The guard judges each step of a climb.

This module depends on the family of a method, and not on the method itself.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_teleport.event.guard import Guard
from hf_teleport.event.measurement import Measurement
from hf_teleport.layers.point import Point, loss_at
from hf_teleport.methods import ClimbingMethod, TurningMethod
from hf_teleport.weights.snapshot import Snapshot

# How often a rejected step is tried again at half its length before the batch's turn ends.
HALVINGS = 4


def turn(method: TurningMethod, progress: Callable[[int, int], None]) -> tuple[int, str]:
    """Carry out a turn. Returns how many steps were made, and why they ended."""
    if method.aligned:
        return 0, "aligned"
    method.ranks.together(method.carry_out)
    progress(1, 1)
    return 1, "steps_done"


class Climb:
    """The moves of one event of a climbing method.

    Args:
        method: fitted to the batches.
        progress: called after each step with the number of steps taken and the most there can be.
    """

    def __init__(self, method: ClimbingMethod, guard: Guard, progress: Callable[[int, int], None]):
        self._method = method
        self._config = method.config
        self._guard = guard
        self._ranks = method.ranks
        self._progress = progress
        self._trusting = False

    def run(self, batches: list[Any], before: Measurement, snapshot: Snapshot) -> tuple[int, str]:
        """Climb on all batches. Returns how many steps were kept, and why the steps on most batches ended.

        A method may trust that its moves change no loss, and then checks the loss only at the end. If the loss did change, the
        moves are undone and made again with a check of each.

        Args:
            before: the measurement of the batches before the event.
            snapshot: the weights before the event.
        """
        steps, reason = self._ascend(batches, before)
        if self._trusting and reason == "max_loss_change":
            snapshot.restore()
            self._method.distrust()
            steps, reason = self._ascend(batches, before)
        if steps:
            self._ranks.together(partial(self._method.finish, snapshot))
        return steps, reason

    def _ascend(self, batches: list[Any], before: Measurement) -> tuple[int, str]:
        method, steps = self._method, 0
        endings: Counter[str] = Counter()
        for i, batch in enumerate(batches):
            loss, seed = before.losses[i], self._config.seed + i
            taken, ending = self._climb_on(batch, seed, loss, before.grad_norms[i], steps, len(batches))
            steps += taken
            if taken and self._trusting and self._config.max_loss_change is not None:
                seen = loss_at(method.model, method.loss_fn, batch, seed=seed, weights=method.weights)
                if not self._config.allows(seen, loss):
                    return steps, "max_loss_change"
            endings[ending] += 1
        return steps, endings.most_common(1)[0][0]

    def _climb_on(self, batch: Any, seed: int, loss: float, grad_norm: float, steps: int, batches: int) -> tuple[int, str]:
        """Climb on one batch. It is a separate function, so that its tensors are freed before the next batch begins.

        Args:
            loss, grad_norm: of the batch before the event.
            steps: number of steps taken on the earlier batches.
            batches: number of batches.
        """
        point = self._method.begin(batch, seed)
        self._trusting = point.graph is not None
        ending, taken = self._guard.objection(point, loss, grad_norm), 0
        while not ending and taken < self._config.steps_per_batch:
            if ending := self._guard.limit(point, grad_norm):
                break
            reached, ending = self._step(point, loss, grad_norm)
            if reached is None:
                break
            point = reached
            taken += 1
            self._progress(steps + taken, batches * self._config.steps_per_batch)
        return taken, ending or "steps_done"

    def _step(self, point: Point, loss: float, grad_norm: float) -> tuple[Point | None, str]:
        """Make a move, and shorten it until the guard accepts it. None with a reason: there is no move, or it was undone."""
        method = self._method
        move = method.propose(point)
        if move is None:
            return None, "no_direction"
        point.release()  # the move has used its tensors
        self._ranks.together(move.make)
        for halvings in range(HALVINGS + 1):
            if halvings:
                self._ranks.together(move.halve)
            reached = method.evaluate_again(point)
            objection = self._guard.objection(reached, loss, grad_norm)
            if not objection and move.gains(reached):
                return reached, ""
            objection = objection or "no_gain"
            del reached  # free the largest tensors of a step before the next attempt
        move.undo()
        return None, objection
