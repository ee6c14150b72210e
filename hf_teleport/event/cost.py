"""The estimated cost of an event, before it runs. It is measured by a pass over one teleport batch."""

import math
import time
from dataclasses import dataclass
from typing import Any

from hf_teleport.config import TeleportConfig
from hf_teleport.display.quantities import duration, size
from hf_teleport.layers.point import Point
from hf_teleport.methods import METHODS, Method, TurningMethod

# The log warns if teleports may take a larger share of the run's time.
LARGE_SHARE = 0.05


def event_passes(config: TeleportConfig) -> int:
    """Upper limit of forward and backward passes over a teleport batch in one event. Includes the two rehearsals."""
    return METHODS[config.method].passes(config) + 2 * config.rehearsal_steps


@dataclass(frozen=True)
class Cost:
    """An estimate of an event's cost.

    Attributes:
        pass_seconds: time of a forward and backward over a teleport batch.
        event_seconds: time of an event: its passes, decompositions and turn.
        event_bytes: memory of an event, beside the weights, the optimizer's state and a batch's activations.
        decomposition_seconds, turn_seconds: the parts of `event_seconds` for decompositions, and for the turn of a basis.
        look_seconds: time of reading the gradients of one training step, for a basis that follows training.
    """

    pass_seconds: float = math.nan
    event_seconds: float = math.nan
    event_bytes: int = 0
    decomposition_seconds: float = 0.0
    turn_seconds: float = 0.0
    look_seconds: float = 0.0

    @classmethod
    def of(cls, method: Method, batch: Any, point: Point) -> "Cost":
        """Estimate the cost of a method's event.

        Args:
            method: the method, which has surveyed the batch.
            point: the result of that evaluation.
        """
        # This is not the first evaluation of the batch, because the first forward of a run takes longer.
        start = time.perf_counter()
        method.evaluate(batch, point.seed)
        seconds = time.perf_counter() - start
        decompositions = method.ranks.together(lambda: method.decomposition_seconds(point))
        turn = look = 0.0
        if isinstance(method, TurningMethod):
            turn = method.ranks.together(lambda: method.turn_seconds(point))
            look = method.ranks.together(lambda: method.look_seconds(point))
        event = event_passes(method.config) * seconds + decompositions + turn
        return cls(seconds, event, method.event_bytes(), decompositions, turn, look)

    def of_run(self, events: int, looks: int) -> float:
        """The seconds of this many events, and of reading the gradients of this many training steps."""
        return events * self.event_seconds + looks * self.look_seconds

    def __str__(self) -> str:
        return f"{duration(self.event_seconds)} and {size(self.event_bytes)} beside a batch's activations"


def share_of_run(event_seconds: float, training_passes: float, pass_seconds: float) -> float:
    """The time of all events as a share of training, which takes this many passes. Infinite if no training is left."""
    return event_seconds / (training_passes * pass_seconds) if training_passes else math.inf


def cost_warning(costs: list[Cost], events: int, training_passes: float, looks: int = 0) -> str:
    """A warning if teleports may take more than a small share of the run. Empty: they take less.

    Args:
        costs: the cost of one event, for each of its methods.
        events: number of events.
        training_passes: the length of the remaining training, in passes over a teleport batch.
        looks: number of training steps whose gradients are read.
    """
    share_of_time = share_of_run(sum(cost.of_run(events, looks) for cost in costs), training_passes, costs[0].pass_seconds)
    if share_of_time <= LARGE_SHARE:
        return ""
    advice = "Fewer events and a smaller teleport batch_size make them cheaper: see docs/performance.md."
    return f"Teleports may take about {100 * share_of_time:.0f} % of the time of training itself. {advice}"
