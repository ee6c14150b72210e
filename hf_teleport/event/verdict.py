"""Whether a move did no harm: the loss on a batch held back, and on the teleport batches, stays within `max_loss_change`."""

import math
from typing import Any

from hf_teleport.event.climb import HALVINGS
from hf_teleport.event.measurement import Measurement
from hf_teleport.layers.point import loss_at
from hf_teleport.methods import ClimbingMethod, TurningMethod
from hf_teleport.weights.snapshot import Snapshot


def held_back_loss(method: ClimbingMethod | TurningMethod, batch: Any) -> float:
    """The loss on the batch that takes no part in the event; NaN if there is none."""
    if batch is None:
        return math.nan
    return loss_at(method.model, method.loss_fn, batch, seed=method.config.seed, weights=method.weights)


def shorten(method: ClimbingMethod | TurningMethod, snapshot: Snapshot, watched: float, batch: Any) -> str:
    """Halve the whole move until the loss on the batch held back is near what it was.

    Args:
        snapshot: the weights before the move.
        watched: the loss before the move; not finite if there is no such batch.

    Returns:
        The objection if no half is near enough; otherwise empty.
    """
    if not math.isfinite(watched):
        return ""
    for _ in range(HALVINGS + 1):
        loss = held_back_loss(method, batch)
        if math.isfinite(loss) and method.config.allows(loss, watched):
            return ""
        if isinstance(method, TurningMethod):  # half a rotation is none
            break
        snapshot.halve()
    return "held_back"


def verdict(method: ClimbingMethod | TurningMethod, before: Measurement, after: Measurement) -> str:
    """Why the event must be undone, the same on every rank; empty if it stands."""
    own = method.objection if isinstance(method, TurningMethod) else ""
    # A unit that is saturated hides what becomes of its weights.
    if not method.ranks.together(lambda: after.finite and all(p.isfinite().all() for p in method.movable)):
        own = "non_finite"
    elif not own and not method.config.allows(after.loss, before.loss):
        own = "max_loss_change"
    return next((objection for objection in method.ranks.gather(own) if objection), "")
