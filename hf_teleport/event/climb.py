"""The steps of an event: on every batch in turn, each under the guard.

Knows no more of a method than its interface.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from hf_teleport.event.guard import Guard
from hf_teleport.event.measurement import Measurement
from hf_teleport.layers.point import Point, loss_at
from hf_teleport.methods import Method
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.snapshot import Snapshot

# A step that meets an objection is tried again at half its length this many times before the batch's turn ends.
HALVINGS = 4


class Climb:
    """The moves of one event.

    Args:
        method: fitted to the batches.
        ranks: the processes that move alike.
        progress: called after each step with the number of steps taken and the most there can be.
    """

    def __init__(self, method: Method, guard: Guard, ranks: Ranks, progress: Callable[[int, int], None]):
        self._method = method
        self._config = method.config
        self._guard = guard
        self._ranks = ranks
        self._progress = progress

    def run(self, batches: list[Any], before: Measurement, snapshot: Snapshot) -> tuple[int, str]:
        """Returns how many steps were kept, and why most of the turns ended.

        If the method trusted its moves and they changed a loss, they are undone and made again without trust.

        Args:
            before: of the batches, before the event.
            snapshot: of the weights, before the event.
        """
        method = self._method
        if method.once:
            return self._jump()
        steps, reason = self._ascend(batches, before)
        if method.trusting and reason == "max_loss_change":
            snapshot.restore()
            method.distrust()
            steps, reason = self._ascend(batches, before)
        return steps, reason

    def _jump(self) -> tuple[int, str]:
        """The one move of a method that makes but one."""
        move = self._method.propose()
        if move is None:
            return 0, "aligned"
        self._ranks.together(lambda: move(1.0))
        self._progress(1, 1)
        return 1, "steps_done"

    def _ascend(self, batches: list[Any], before: Measurement) -> tuple[int, str]:
        method, steps = self._method, 0
        endings: Counter[str] = Counter()
        for i, batch in enumerate(batches):
            loss, seed = before.losses[i], self._config.seed + i
            taken, ending = self._turn(batch, seed, loss, before.grad_norms[i], steps, len(batches))
            steps += taken
            if taken and method.trusting and self._config.max_loss_change is not None:
                seen = loss_at(method.model, method.loss_fn, batch, seed=seed, ranks=method.ranks)
                if not self._config.allows(seen, loss):
                    return steps, "max_loss_change"
            endings[ending] += 1
        return steps, endings.most_common(1)[0][0]

    def _turn(self, batch: Any, seed: int, loss: float, grad_norm: float, steps: int, turns: int) -> tuple[int, str]:
        """The steps on one batch, apart, so that nothing of them is held when the next turn begins.

        Args:
            loss, grad_norm: of the batch before the event.
            steps: taken in the turns before, of so many turns.
        """
        point = self._method.begin(batch, seed)
        ending, taken = self._guard.objection(point, loss, grad_norm), 0
        while not ending and taken < self._config.steps_per_batch:
            if ending := self._guard.limit(point, grad_norm):
                break
            reached, ending = self._step(point, loss, grad_norm)
            if reached is None:
                break
            point = reached
            taken += 1
            self._progress(steps + taken, turns * self._config.steps_per_batch)
        return taken, ending or "steps_done"

    def _step(self, point: Point, loss: float, grad_norm: float) -> tuple[Point | None, str]:
        """Make a move, shortened until there is no objection. None, and why: there is none, or it was undone."""
        method = self._method
        move = method.propose(point)
        if move is None:
            return None, "no_direction"
        point.release()  # the move is made of them
        self._ranks.together(move.make)
        for halvings in range(HALVINGS + 1):
            if halvings:
                self._ranks.together(move.halve)
            reached = method.evaluate_again(point)
            objection = self._guard.objection(reached, loss, grad_norm)
            if not objection and method.gains(reached, move.fraction):
                return reached, ""
            objection = objection or "no_gain"
            del reached  # of the memory of a step, the largest part
        move.undo()
        return None, objection
