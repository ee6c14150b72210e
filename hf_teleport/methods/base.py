"""The interface of a method; schedule, guard, report, data and ranks know no more than this."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_teleport.ascent import LossFn, Point, evaluate
from hf_teleport.config import TeleportConfig
from hf_teleport.report import LayerReport

Move = Callable[[float], None]
"""Carry a move out: `move(1.0)` in full, `move(0.5)` by half, always from where the weights stand."""


class Method(ABC):
    """One event's way of moving. Made anew for each event, in the order survey*, fit, (begin, propose*)*.

    Attributes:
        reports: one for each parameter, filled by `survey`, `fit` and `begin`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, config: TeleportConfig):
        self.model = model
        self.loss_fn = loss_fn
        self.config = config
        self.reports: dict[nn.Parameter, LayerReport] = {}

    def evaluate(self, batch: Any, seed: int) -> Point:
        """Loss and gradients on a batch at the current weights."""
        return evaluate(self.model, self.loss_fn, batch, seed=seed)

    @property
    @abstractmethod
    def movable(self) -> list[nn.Parameter]:
        """The parameters that this method may change; known after the first `survey`."""

    @abstractmethod
    def survey(self, point: Point) -> None:
        """See one teleport batch before anything moves; called for each in turn."""

    def fit(self) -> None:  # noqa: B027  (a method need not)
        """All batches are surveyed: prepare what holds for the whole event."""

    def begin(self, point: Point) -> None:  # noqa: B027  (a method need not)
        """A batch's turn has come: prepare what holds for its steps."""

    @abstractmethod
    def propose(self, point: Point) -> Move | None:
        """The next move from a point. None: there is nowhere to go."""
