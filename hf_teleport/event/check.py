"""What a teleport could do to a model, found without moving anything."""

from dataclasses import dataclass, field

from torch import nn

from hf_teleport.event.cost import Cost
from hf_teleport.report import LayerReport, SymmetryReport, why_immovable


@dataclass
class Check:
    """What a teleport could do, found without moving anything.

    Attributes:
        loss: the loss on the batch. It may not be finite.
        problem: why nothing could be judged. Empty: there was no problem.
        layers: a report for every weight. Empty if there is a problem.
        symmetries: the symmetries that were found, if the method turns symmetries.
        blocking: norm gains that must stay uniform if the residual stream is to turn.
        cost: the estimated cost of an event. Its times are NaN if there is a problem.
    """

    loss: float
    problem: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    symmetries: list[SymmetryReport] = field(default_factory=list)
    blocking: list[nn.Parameter] = field(default_factory=list)
    cost: Cost = Cost()

    @property
    def immovable(self) -> str:
        """The most frequent reasons why no weight may move. Empty: one may, or nothing could be judged."""
        return why_immovable(self.layers) if self.layers and not any(layer.movable for layer in self.layers) else ""

    def require_movable(self) -> None:
        """Make sure that a weight may move, if the batch could be judged.

        Raises:
            ValueError: no weight may move. The message has the most frequent reasons.
        """
        if self.immovable:
            raise ValueError(
                f"{self.immovable}. See target_modules and exclude_modules if they select too little; `hf-teleport inspect` "
                "tells more of a saved model; with teleport_epochs 0 training runs without teleports."
            )
