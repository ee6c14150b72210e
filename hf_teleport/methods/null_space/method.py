"""Null space gradient projection: the paper's method (arXiv 2502.11362, Algorithm 1).

`W <- W + eta (∇_W ½||∇L||²) P` for every layer at once. A move in the null space of a layer's inputs does not change its output,
nor the inputs of every layer above. So one projector serves all steps, and no layer's projector depends on another's.
"""

import math
import time
from collections import defaultdict
from functools import cached_property, partial
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.audit import TIED_VIEWS, UNUSED, audit, overlap
from hf_teleport.layers.layer import Layer
from hf_teleport.layers.point import Point, evaluate, loss_at
from hf_teleport.layers.subspace import Representation, Subspace
from hf_teleport.methods.base import ClimbingMethod, Move
from hf_teleport.methods.null_space.decomposition import null_spaces
from hf_teleport.methods.null_space.direction import ShiftLength, exact_direction, fast_direction
from hf_teleport.methods.null_space.inputs import Inputs, random_move
from hf_teleport.methods.null_space.objectives import OBJECTIVES, Objective, Slope, Surroundings
from hf_teleport.report import LayerReport
from hf_teleport.weights.norms import norm
from hf_teleport.weights.ranks import ALONE
from hf_teleport.weights.region import Region
from hf_teleport.weights.snapshot import Snapshot

# Energy thresholds to try, from the one that leaves most room to the exact null space.
_THRESHOLDS = [0.99, 0.999, 0.9999, 1.0]


Moves = dict[Any, Tensor]
"""A direction for each layer, as its matrix; of weights that stay sharded for each parameter, this process's part."""


class NullSpace(ClimbingMethod):
    """Ascent of the objective inside the null space of every layer's inputs.

    Attributes:
        trusting: whether a move is taken to leave activations and loss as they were, so that points keep their graphs.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.layers: list[Layer] = []
        self.subspaces: dict[Layer, Subspace] = {}
        self._inputs = Inputs(self.ranks)
        self._batches: list[Any] = []
        # The line search: the objective before the last move, its slope after it if that was asked for, and how much shorter
        # than configured the next step is.
        self._value = -math.inf
        self._reached: Slope | None = None
        self._scale = 1.0
        self._shift = ShiftLength()
        # Sharded weights are not at hand for a backward alone.
        exact = self.config.hessian == "fast" and self.config.energy_threshold in (1, None)
        self.trusting = exact and self.weights.whole

    @cached_property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.config.objective](
            Surroundings(
                parameters=[p for p in self.model.parameters() if p.requires_grad],
                evaluate=partial(self._evaluate, follow=[]),
                another=self._another,
                rehearsal=self.rehearsal,
                radius=self.config.radius,
                seed=self.config.seed,
            )
        )

    @staticmethod
    def passes(config: TeleportConfig) -> int:
        # Before, at the start and the end of a turn, and after; a step is a pass, and a forward at shifted weights.
        objective = OBJECTIVES[config.objective]
        turn, step = 4, 2 + objective.passes
        if objective.searched:
            # A step begins at twice the last length, so it is tried about twice. A batch's last step may be tried five times.
            turn, step = turn + 5, step + 1
        return config.num_batches * (turn + step * config.steps_per_batch)

    @staticmethod
    def on_shards(config: TeleportConfig) -> bool:
        usual = config.hessian == "fast" and config.objective == "grad_norm" and config.energy_threshold is not None
        return usual and config.control != "random_move" and not config.rehearsal_steps

    @staticmethod
    def copies(config: TeleportConfig) -> int:
        return OBJECTIVES[config.objective].copies

    def decomposition_seconds(self, point: Point) -> float:
        joint, tau = self.config.scope == "joint", self.config.energy_threshold
        tries, tau = (len(_THRESHOLDS), _THRESHOLDS[0]) if tau is None else (1, tau)
        repeats = self.config.num_batches if joint else 1
        costs: dict[Layer, float] = {}
        counted = set()
        for layer in self.layers:
            uses = point.trace.uses[layer.weight][layer.region]
            if (read := layer.reads(uses)) in counted:
                continue
            counted.add(read)
            groups, _, width = layer.shape
            # A width counts the bias, an input does not.
            rows = max(1, repeats * sum(use.call.input.numel() for use in uses) // (groups * width))
            costs[layer] = groups * width * min(rows, width) ** 2
        if not costs:
            return 0.0
        longest = max(costs, key=lambda layer: costs[layer])
        start = time.perf_counter()
        representation = Representation()
        for _ in range(repeats):
            longest.represent(point.trace.uses[longest.weight][longest.region], representation)
        null_spaces({longest: representation}, {longest: longest.weight.dtype}, tau, ALONE)
        seconds = time.perf_counter() - start
        events = tries if joint else self.config.num_batches
        return events * seconds * sum(costs.values()) / costs[longest] / self.ranks.size

    @property
    def movable(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for layer in self.layers for parameter in layer.parameters))

    def evaluate(self, batch: object, seed: int, **options: Any) -> Point:
        return self._evaluate(batch, seed, differentiable_gradients=self.config.hessian == "exact", **options)

    def _evaluate(self, batch: object, seed: int, **options: Any) -> Point:
        return evaluate(self.model, self.loss_fn, batch, seed=seed, weights=self.weights, **options)

    def survey(self, point: Point) -> None:
        if not self._batches:
            self._objective  # noqa: B018  (says now what it lacks)
        self._batches.append(point.batch)
        layers, reports = self.ranks.together(lambda: audit(self.model, point, self.config))
        if not self.reports and self.config.hessian == "exact":
            # Whether the model can be differentiated twice shows here, before training, and not at the first step.
            exact_direction(point, point.own_gradients, layers)
        for audited in self._everywhere(layers, reports):
            self._merge(*audited)
        if self.config.scope == "joint":
            self.ranks.together(lambda: self._inputs.add(self.layers, point))

    def _everywhere(
        self, layers: list[Layer], reports: dict[nn.Parameter, LayerReport]
    ) -> list[tuple[list[Layer], dict[nn.Parameter, LayerReport]]]:
        """What every process found on its share of a batch, in the order of ranks; a process has no other's parameters."""
        if self.ranks.size == 1:
            return [(layers, reports)]
        parameters = list(self.model.parameters())
        number: dict[nn.Parameter | None, int] = {parameter: i for i, parameter in enumerate(parameters)}
        portable = (
            [(v.name, v.role, number[v.weight], v.region, number.get(v.bias), v.projector) for v in layers],
            {number[parameter]: report for parameter, report in reports.items()},
        )
        found = []
        for theirs, verdicts in self.ranks.gather(portable):
            own = [
                Layer(name, role, parameters[weight], region, None if bias is None else parameters[bias], projector)
                for name, role, weight, region, bias, projector in theirs
            ]
            found.append((own, {parameters[i]: report for i, report in verdicts.items()}))
        return found

    def _merge(self, layers: list[Layer], reports: dict[nn.Parameter, LayerReport]) -> None:
        """Take in the audit of a batch, or of one process's share of it: a weight moves if some let it and none forbids it.

        Not to be used by a batch forbids nothing: an expert may get its first tokens in the second.
        """
        for parameter, report in reports.items():
            known = self.reports.setdefault(parameter, report)
            if known.reason == UNUSED or (known.movable and report.reason not in ("", UNUSED)):
                self.reports[parameter] = report
        known_layers = {(layer.weight, layer.region): layer for layer in self.layers}
        for layer in layers:
            known_layer = known_layers.get((layer.weight, layer.region))
            if known_layer is None:
                self.layers.append(layer)
            elif known_layer.bias is not layer.bias:
                self.reports[layer.weight].movable = False
                self.reports[layer.weight].reason = "its bias is used otherwise in another teleport batch"

    def fit(self) -> None:
        regions_of: dict[nn.Parameter, list[Region]] = defaultdict(list)
        for layer in self.layers:
            regions_of[layer.weight].append(layer.region)
        for parameter, regions in regions_of.items():
            if overlap(parameter, regions):
                self.reports[parameter].movable = False
                self.reports[parameter].reason = TIED_VIEWS
        self.layers = [layer for layer in self.layers if self.reports[layer.weight].movable]
        for layer in self.layers:
            if layer.bias is not None:
                self.reports.pop(layer.bias, None)
        if self.config.scope == "joint":
            self._decompose()

    def begin(self, batch: object, seed: int) -> Point:
        # D is kept for each use that is followed: with the null spaces known, only where there is a move to come.
        joint = self.config.scope == "joint"
        follow = [layer.weight for layer in (self._moving if joint else self.layers)]
        point = self.evaluate(batch, seed, keep_graph=self.trusting, follow=follow)
        self._reached, self._scale = None, 1.0
        self.trusting = point.graph is not None
        if not joint:
            self.ranks.together(lambda: self._inputs.add(self.layers, point))
            self._decompose()
        return point

    def _another(self, batch: Any) -> tuple[Any, int]:
        """The teleport batch after a given one, round about, and its seed."""
        following = next((i + 1 for i, other in enumerate(self._batches) if other is batch), 0) % len(self._batches)
        return self._batches[following], self.config.seed + following

    @property
    def _moving(self) -> list[Layer]:
        return [layer for layer, subspace in self.subspaces.items() if subspace.null_dim]

    def distrust(self) -> None:
        self.trusting = False
        # What was learnt where the weights should not have gone.
        self._shift = ShiftLength()

    def propose(self, point: Point) -> Move | None:
        slope = self._reached or self._objective.slope(point)
        self._value, self._reached = slope.value, None
        moves = self._projected(point, slope)
        lengths = self.weights.norms(moves.values())
        length = math.hypot(*lengths)
        if length == 0 or not math.isfinite(length):
            return None
        # A layer that has no direction but rounding stays where it is, bit for bit.
        long = (own > torch.finfo(move.dtype).eps * length for move, own in zip(moves.values(), lengths, strict=True))
        moves = dict(compress(moves.items(), long))
        return self._step(moves, self._scale * self.config.learning_rate * self._unit(length))

    def _projected(self, point: Point, slope: Slope) -> Moves:
        """The objective's gradient `H v + p` in the null space of each layer."""
        moves: Moves = {}
        layers = self._moving
        if slope.along is not None and self.config.hessian == "exact":
            products = exact_direction(point, slope.along, layers, self.ranks)
            moves = self.ranks.together(lambda: {layer: self.subspaces[layer].project(h) for layer, h in products.items()})
        elif slope.along is not None:
            around = point, slope.along, layers, self.subspaces, self._shift, self.weights, slope.length
            moves = fast_direction(self.model, self.loss_fn, *around)
        if slope.plain is not None:
            plain = dict(zip(point.parameters, slope.plain, strict=True))
            for layer in layers:
                if plain[layer.weight] is not None:
                    own = self.subspaces[layer].project(layer.matrix(plain))
                    moves[layer] = moves[layer].add_(own) if layer in moves else own
        return moves

    def _gains(self, reached: Point, fraction: float) -> bool:
        if not self._objective.searched:
            return True
        slope = self._objective.slope(reached)
        if not slope.value > self._value:
            return False
        # The next step is tried at twice what was good here, but never longer than configured: far away nothing is known.
        self._reached, self._scale = slope, min(1.0, 2 * fraction * self._scale)
        return True

    def _unit(self, length: float) -> float:
        """What the learning rate multiplies: 1, or the factor that makes a move as long as the weights it moves."""
        if self.config.step_size == "fixed":
            return 1.0
        return self.weights.norm(self.movable) / length

    def _step(self, moves: Moves, rate: float) -> Move:
        def carry_out(fraction: float) -> None:
            for place, direction in moves.items():
                if isinstance(place, Layer):
                    place.add_(direction, rate * fraction)
                else:
                    place.data.add_(direction, alpha=rate * fraction)

        changed = (place.parameters if isinstance(place, Layer) else [place] for place in moves)
        parameters = dict.fromkeys(chain.from_iterable(changed))
        return Move(carry_out, partial(Snapshot, parameters), straight=True, gains=self._gains)

    def finish(self, snapshot: Snapshot) -> None:
        if self.config.control != "random_move":
            return
        # In place of the event's move: in each layer's null space a random one of the same length.
        moved: dict[nn.Parameter, Tensor | None] = {**snapshot.moved()}
        lengths = {layer: norm([layer.matrix(moved)]) for layer in self._moving}
        snapshot.restore()
        for layer, move in random_move({layer: self.subspaces[layer] for layer in lengths}, self.config.seed).items():
            if lengths[layer]:
                layer.add_(move, lengths[layer] / norm([move]))

    def _decompose(self) -> None:
        """Turn the inputs into null spaces: at tau, or at the lowest threshold of some that keeps the loss."""
        given = self.config.energy_threshold
        thresholds = _THRESHOLDS if given is None else [given]
        for tau in thresholds:
            found = self._inputs.null_spaces(self.layers, tau)
            self.subspaces = {layer: subspace for layer, subspace in found.items() if subspace is not None}
            if tau == thresholds[-1] or self._keeps_loss():
                break
        self._inputs.forget()
        # In the exact null space of a batch its activations stay, and so does the graph of its forward.
        self.trusting = self.trusting and tau == 1
        self._note(found, tau)

    def _keeps_loss(self) -> bool:
        """Whether a random move as long as a step changes the first batch's loss by no more than is allowed."""
        loss = partial(loss_at, self.model, self.loss_fn, self._batches[0], seed=self.config.seed, weights=self.weights)
        before = loss()
        moves = random_move({layer: self.subspaces[layer] for layer in self._moving}, self.config.seed)
        length = norm(moves.values())
        move = self._step(moves, self.config.learning_rate * self._unit(length) if length else 0.0)
        move.make()
        after = loss()
        move.undo()
        return self.config.allows(after, before)

    def _note(self, found: dict[Layer, Subspace | None], tau: float) -> None:
        """Note the dimensions of the null spaces in the reports."""
        for layer in self.layers:
            report = self.reports[layer.weight]
            report.null_dim, report.input_dim, report.captured = 0, 0, None
        for layer, subspace in found.items():
            report = self.reports[layer.weight]
            if subspace is None:
                report.reason = "its inputs could not be decomposed: the algorithm did not converge"
                continue
            report.null_dim = (report.null_dim or 0) + subspace.null_dim
            report.input_dim = (report.input_dim or 0) + subspace.dim
            report.captured = min(subspace.captured, 1.0 if report.captured is None else report.captured)
            report.reason = "" if report.null_dim else _spanned(subspace, tau)


def _spanned(subspace: Subspace, tau: float) -> str:
    groups, width, _ = subspace.basis.shape
    each = f" in each of {groups} groups" if groups > 1 else ""
    return (
        f"no null space: {subspace.num_rows} input rows span all {width} dimensions{each} at tau = {tau:g}; "
        "take fewer samples, or energy_threshold below 1"
    )
