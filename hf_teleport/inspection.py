"""What would move in a model, at which energy thresholds, and what the decompositions cost: without training it."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from hf_teleport.config import TeleportConfig
from hf_teleport.event.cost import Cost
from hf_teleport.layers.audit import audit
from hf_teleport.layers.point import LossFn, evaluate
from hf_teleport.layers.subspace import Representation, core_dims, rank_tolerance
from hf_teleport.report import LayerReport, share
from hf_teleport.settings.groups import reads
from hf_teleport.teleporter import Teleporter
from hf_teleport.weights.isolation import evaluation_mode, full_precision, preserved_rng
from hf_teleport.weights.snapshot import Snapshot

THRESHOLDS = (1.0, 0.999, 0.99)


@dataclass
class InspectedLayer(LayerReport):
    """A layer's report with what a decomposition of its inputs says.

    Attributes:
        tokens: input rows on this batch: samples, tokens or patches; over all uses and regions.
        null_dims: dimension of the null space at each threshold, by its number as text.
        seconds: of the decomposition, which serves all thresholds.
    """

    tokens: int = 0
    null_dims: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Inspection:
    """What an inspection found.

    Attributes:
        layers: one for each parameter; biases that move with their layer are part of it.
        loss: on the batch.
        cost: what an event is likely to cost.
    """

    layers: list[InspectedLayer]
    loss: float
    cost: Cost

    @property
    def moved_share(self) -> float:
        """Elements that one step at tau = 1 moved, of those of all layers."""
        return share(self.layers, lambda layer: layer.moved)

    @property
    def movable_share(self) -> float:
        """Elements that may move, given a null space and a direction, of those of all layers."""
        return share(self.layers, lambda layer: layer.movable)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "moved_share": self.moved_share,
            "movable_share": self.movable_share,
            "loss": self.loss,
            "cost": asdict(self.cost),
        }


def inspect_model(model: nn.Module, batch: Any, loss_fn: LossFn, config: TeleportConfig | None = None) -> Inspection:
    """Judge each weight of a model on one batch, decompose the inputs of those that may move, and try one step.

    The step is made at tau = 1, and afterwards the weights are those before.

    Raises:
        ValueError: as `Teleporter.teleport`.
    """
    config = config or TeleportConfig()
    snapshot = Snapshot(model.parameters())
    cost = Teleporter(model, config).check(batch, loss_fn).cost
    one_step = {name: value for name, value in _ONE_STEP.items() if reads(config.method, name)}
    report = Teleporter(model, TeleportConfig(**{**config.to_dict(), **one_step})).teleport([batch], loss_fn)
    snapshot.restore()
    inspected = {layer.name: InspectedLayer(**asdict(layer)) for layer in report.layers}
    with preserved_rng(), evaluation_mode(model), full_precision(model):
        point = evaluate(model, loss_fn, batch, seed=config.seed)
        layers, _ = audit(model, point, config)
        for layer in layers:
            found = inspected[layer.name]
            start = time.perf_counter()
            representation = Representation()
            layer.represent(point.trace.uses[layer.weight][layer.region], representation)
            values, vectors = representation.decompose()
            found.seconds += time.perf_counter() - start
            found.tokens += representation.num_rows
            groups, width, _ = vectors.shape
            for tau in THRESHOLDS:
                core = core_dims(values, tau, rank_tolerance(width, representation.dtype))
                found.null_dims[f"{tau:g}"] = found.null_dims.get(f"{tau:g}", 0) + groups * width - int(core.sum())
    return Inspection(list(inspected.values()), report.loss_before, cost or Cost())


_ONE_STEP = {"num_batches": 1, "steps_per_batch": 1, "energy_threshold": 1.0, "max_growth": None, "grad_norm_cap": None}
