"""Find out, without training, which weights of a model would move, at which energy thresholds, and what that costs."""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_teleport.config import TeleportConfig
from hf_teleport.event.check import Check
from hf_teleport.event.cost import Cost, share_of_run
from hf_teleport.event.reasons import NO_STEP
from hf_teleport.layers.audit import audit
from hf_teleport.layers.point import LossFn, evaluate
from hf_teleport.layers.subspace import Representation, core_dims, rank_tolerance
from hf_teleport.methods.basis.cost import Decomposition, decompositions, longest
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.report import LayerReport, share
from hf_teleport.settings.groups import reads
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.schedule import teleport_steps
from hf_teleport.weights.isolation import evaluation_mode, full_precision, preserved_rng
from hf_teleport.weights.snapshot import Snapshot

THRESHOLDS = (1.0, 0.999, 0.99)


@dataclass
class InspectedLayer(LayerReport):
    """A layer's report, with the results of a decomposition of its inputs.

    Attributes:
        tokens: input rows on this batch (samples, tokens or patches), over all uses and regions.
        null_dims: dimension of the null space at each threshold. The keys are the thresholds as text.
        seconds: time of the decomposition. One decomposition serves all thresholds.
    """

    tokens: int = 0
    null_dims: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        layers: one for each parameter. A bias that moves with its layer is part of that layer.
        loss: the loss on the batch.
        cost: the estimated cost of an event.
    """

    layers: list[InspectedLayer]
    loss: float
    cost: Cost

    @property
    def moved_share(self) -> float:
        """Share of the weights' elements that one step at tau = 1 moved."""
        return share(self.layers, lambda layer: layer.moved)

    @property
    def movable_share(self) -> float:
        """Share of the weights' elements that may move if their layer has a null space and a direction."""
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


def judged(teleporter: Teleporter, batch: Any, loss_fn: LossFn) -> Check:
    """`Teleporter.check`, where a batch that shows nothing is an error.

    Raises:
        ValueError: as `Teleporter.check`; or the loss is not finite, or memory ran out.
    """
    check = teleporter.check(batch, loss_fn)
    if problem := check.problem:
        raise ValueError(f"{problem}.")
    return check


def inspect_model(model: nn.Module, batch: Any, loss_fn: LossFn, config: TeleportConfig | None = None) -> Inspection:
    """Judge each weight of a model on one batch, decompose the inputs of the weights that may move, and try one step.

    The step is made at tau = 1 and then undone.

    Raises:
        ValueError: as `judged`; or memory ran out in the step.
    """
    config = config or TeleportConfig()
    snapshot = Snapshot(model.parameters())
    check = judged(Teleporter(model, config), batch, loss_fn)
    one_step = {name: value for name, value in _ONE_STEP.items() if reads(config.method, name)}
    report = Teleporter(model, replace(config, **one_step)).teleport([batch], loss_fn)
    snapshot.restore()
    if not report.layers:
        problem = NO_STEP[report.stopped_because]
        raise ValueError(f"{problem}.")
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
    return Inspection(list(inspected.values()), report.loss_before, check.cost)


@dataclass
class RunCost:
    """The estimated cost of all events of a run with method 'basis'.

    Attributes:
        event: the cost of one event, and of reading one training step's gradients.
        steps: the events come before these steps.
        looks: number of training steps whose gradients are read.
        max_steps: optimizer steps of the run.
        decompositions: the decompositions of one event, each with the process that makes it.
        device: the device of the decompositions.
        moment_bytes: memory of the second moments that are gathered between events.
    """

    event: Cost
    steps: list[int]
    looks: int
    max_steps: int
    decompositions: list[Decomposition]
    device: str
    moment_bytes: int

    @property
    def seconds(self) -> float:
        """Time of all events, and of reading the gradients."""
        return self.event.of_run(len(self.steps), self.looks)

    @property
    def share(self) -> float:
        """`seconds` as a share of the run, if a training step takes one pass over such a batch."""
        return share_of_run(self.seconds, self.max_steps, self.event.pass_seconds)

    @property
    def by_process(self) -> dict[int, list[Decomposition]]:
        """The decompositions of each process, the longest first."""
        found = defaultdict(list)
        for each in sorted(self.decompositions, key=lambda each: -each.seconds):
            found[each.process].append(each)
        return dict(sorted(found.items()))


def run_cost(model: nn.Module, batch: Any, loss_fn: LossFn, max_steps: int, processes: int = 1) -> RunCost:
    """Estimate from one batch how long the events of a run take, with AdamW and the default settings of method 'basis'.

    Nothing moves. The estimate uses one process, even for several: these share the decompositions and nothing else.

    Args:
        max_steps: optimizer steps of the run, taken as one epoch.
        processes: number of processes that share the decompositions.

    Raises:
        ValueError: as `Teleporter.check`, or the run has fewer than 2 steps.
    """
    if max_steps < 2:
        raise ValueError(f"max_steps = {max_steps} is not allowed; allowed: a whole number from 2.")
    config = TeleportConfig(method="basis")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    found = Teleporter(model, config, optimizer=optimizer).check(batch, loss_fn)
    used = [symmetry for symmetry in found.symmetries if not symmetry.reason]
    device = next(p.device for p in model.parameters())
    planned = decompositions(used, processes, device)
    cost = replace(found.cost, decomposition_seconds=longest(planned))
    saved = found.cost.decomposition_seconds - cost.decomposition_seconds
    steps, tracker = sorted(teleport_steps(config, max_steps, max_steps)), Tracker(config.track_every)
    return RunCost(
        event=replace(cost, event_seconds=cost.event_seconds - saved),
        steps=steps,
        looks=sum(tracker.looks_at(step) for step in range(max(steps))),
        max_steps=max_steps,
        decompositions=planned,
        device=str(device),
        moment_bytes=sum(4 * symmetry.blocks * symmetry.size**2 for symmetry in used),
    )


_ONE_STEP: dict[str, Any] = {
    "num_batches": 1,
    "steps_per_batch": 1,
    "energy_threshold": 1.0,
    "max_growth": None,
    "grad_norm_cap": None,
}
