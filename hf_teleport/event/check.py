"""What a teleport could do to a model, found without moving anything."""

from dataclasses import dataclass, field

from torch import nn

from hf_teleport.event.cost import Cost
from hf_teleport.report import LayerReport, SymmetryReport, why_immovable


@dataclass
class Check:
    """What a teleport could do, found without moving anything.

    Attributes:
        loss: on the batch, which may not be finite.
        problem: why nothing could be judged; empty if it could.
        layers: a report for every weight; empty if there is a problem.
        symmetries: for a method that turns symmetries, each that was found.
        blocking: norm gains that must stay uniform if the residual stream is to turn.
        cost: what an event will cost; not a number if there is a problem.
    """

    loss: float
    problem: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    symmetries: list[SymmetryReport] = field(default_factory=list)
    blocking: list[nn.Parameter] = field(default_factory=list)
    cost: Cost = Cost()

    @property
    def immovable(self) -> str:
        """The most frequent reasons why no weight may move; empty if one may, or if nothing could be judged."""
        return why_immovable(self.layers) if self.layers and not any(layer.movable for layer in self.layers) else ""

    def require_movable(self) -> None:
        """Raise if the batch was judged, and no weight may move.

        Raises:
            ValueError: with the most frequent reasons.
        """
        if self.immovable:
            raise ValueError(
                f"{self.immovable}. See target_modules and exclude_modules if they select too little; `hf-teleport inspect` "
                "tells more of a saved model; with teleport_epochs 0 training runs without teleports."
            )
