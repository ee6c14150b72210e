"""What an event will cost, estimated before it runs from a pass over one teleport batch."""

import math
import time
from dataclasses import dataclass
from typing import Any

from hf_teleport.config import TeleportConfig
from hf_teleport.display.quantities import duration, size
from hf_teleport.layers.point import Point
from hf_teleport.methods import METHODS, Method

# Teleports that take a larger share of the run's time are worth a warning.
LARGE_SHARE = 0.05


def event_passes(config: TeleportConfig) -> int:
    """The most forward and backward passes over a teleport batch in one event: the method's, and two rehearsals'."""
    return METHODS[config.method].passes(config) + 2 * config.rehearsal_steps


@dataclass(frozen=True)
class Cost:
    """An upper estimate.

    Attributes:
        pass_seconds: of a forward and backward over a teleport batch.
        event_seconds: of an event: its passes and decompositions.
        event_bytes: what an event holds beside the weights, the optimizer's state and a batch's activations.
    """

    pass_seconds: float = math.nan
    event_seconds: float = math.nan
    event_bytes: int = 0

    @classmethod
    def of(cls, method: Method, batch: Any, point: Point) -> "Cost":
        """The cost of a method's event.

        Args:
            method: has surveyed the batch, which came to this point.
        """
        # The batch was evaluated before, because the first forward of a run takes longer than the next ones.
        start = time.perf_counter()
        method.evaluate(batch, point.seed)
        seconds = time.perf_counter() - start
        decompositions = method.ranks.together(lambda: method.decomposition_seconds(point))
        trained = sum(p.numel() * p.element_size() for p in method.model.parameters() if p.requires_grad)
        event = event_passes(method.config) * seconds + decompositions
        return cls(seconds, event, method.copies(method.config) * trained)

    def __str__(self) -> str:
        return f"{duration(self.event_seconds)} and {size(self.event_bytes)} beside a batch's activations"


def share_of_run(event_seconds: float, training_passes: float, pass_seconds: float) -> float:
    """The time of all events as a share of training, which takes this many passes; infinite if no training is left."""
    return event_seconds / (training_passes * pass_seconds) if training_passes else math.inf
