"""Basis teleportation: turn the model's exact symmetries to a basis in which the optimizer learns faster.

A rotation of features that no output depends on leaves the loss and the gradient's norm as they are, for every input. SGD does
not see it; Adam, which scales each coordinate alone, does. docs/basis.md has the derivation and the measurements.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.audit import describe
from hf_teleport.layers.point import Point
from hf_teleport.methods.base import TurningMethod
from hf_teleport.methods.basis import cost
from hf_teleport.methods.basis.agreement import ROUNDINGS, rounding, unturned
from hf_teleport.methods.basis.bases import BASES, Basis, balance
from hf_teleport.methods.basis.features import vectors
from hf_teleport.methods.basis.frozen import frozen_objection, stays_frozen
from hf_teleport.methods.basis.moments import Moments, misalignment, shares, turned
from hf_teleport.methods.basis.smallest import mean_angle
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.symmetry import Part, Symmetry
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.methods.basis.turn import Turn, slices
from hf_teleport.optimizers.hidden import hidden
from hf_teleport.optimizers.state import OptimizerState, check_optimizer
from hf_teleport.report import SymmetryReport
from hf_teleport.weights.snapshot import Snapshot

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class BasisTurn(TurningMethod):
    """One change of basis, exact for every input.

    Attributes:
        tracker: what the run knows of its symmetries and of training's gradients. The teleport batches tell what it does not.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.turn = Turn({})
        self.tracker = Tracker()
        self._found: dict[Symmetry, SymmetryReport] = {}
        self._tracked: dict[Symmetry, Symmetry] = {}  # those of the tracker for those of this event
        self._moments = Moments([])
        self._basis: Basis = BASES[self.config.basis]([], self.config.seed)
        self._first: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[Part, Tensor] = {}  # of each coordinate's gradients after the turn, (H, k)
        self._after: dict[Symmetry, Tensor] = {}  # second moments once turned
        self._before = Snapshot([])
        self._state: OptimizerState | None = None
        self._hidden = ""
        if self.optimizer is not None:
            reset = self.config.optimizer_state == "reset"
            check_optimizer(self.optimizer, reset=reset)
            squares: Any = "keep" if self.config.second_moment == "keep" else "turn"
            self._hidden = hidden(self.optimizer)
            self._state = None if reset else OptimizerState(self.optimizer, squares)

    @staticmethod
    def is_told(config: TeleportConfig) -> bool:
        """Whether training's gradients tell all that an event needs to know, so that one batch is enough to check it on."""
        return bool(config.track_every) and config.basis in ("gradient", "random", "identity")

    @staticmethod
    def passes(config: TeleportConfig) -> int:
        return 2 if BasisTurn.is_told(config) else 2 * config.num_batches

    def decomposition_seconds(self, point: Point) -> float:
        device = next((part.parameter.device for symmetry in self.used for part in symmetry.parts), torch.device("cpu"))
        return cost.longest(cost.decompositions(self._ordered(), self.ranks.size, device))

    def turn_seconds(self, point: Point) -> float:
        # The weights and the optimizer's averages are copied and turned, and the averages compared with their copy. The check's
        # gradients are turned and compared.
        like = next(iter(point.by_parameter.values()))
        turn = self._with_gains(lambda: cost.unmoved(self._ordered(), like))
        return (3 + 2 * self._averages) * cost.turn_seconds(turn, point.by_parameter, self.weights)

    def look_seconds(self, point: Point) -> float:
        if not self.config.track_every:
            return 0.0
        gradients = self.weights.laid_out(point.by_parameter)
        return self._with_gains(lambda: cost.look_seconds(self._ordered(), gradients, self.weights.vote))

    def event_bytes(self) -> int:
        movable = sum(p.nbytes for p in self.movable)
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        # Copies of what turns to return to; and at once the gradients before, those turned, and those after.
        return int((1 + self._averages + len(self.tracker.averages)) * movable) + 3 * trained + cost.moment_bytes(self.used)

    @property
    def _averages(self) -> float:
        """How many averages the optimizer keeps of a weight that turns: the mean over their elements."""
        sizes = {parameter: parameter.numel() for parameter in self.movable}
        kept = 0 if self._state is None else sum(self._state.averages(p) * size for p, size in sizes.items())
        return kept / max(1, sum(sizes.values()))

    @staticmethod
    def on_shards(config: TeleportConfig) -> bool:
        # 'predicted_decrease' climbs with all gradients of a symmetry at once, and a rehearsal steps the whole model.
        return config.basis != "predicted_decrease" and not config.rehearsal_steps

    @property
    def used(self) -> list[Symmetry]:
        """The symmetries that will be turned."""
        return [symmetry for symmetry in self._found if not symmetry.reason]

    @property
    def movable(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for symmetry in self.used for parameter in symmetry.parameters))

    @property
    def written(self) -> list[Tensor]:
        state = self._state
        if state is None or not self.weights.whole:
            return super().written
        return super().written + [t for parameter in self.in_order() for t in state.tensors(parameter)]

    @property
    def blocking(self) -> list[nn.Parameter]:
        return [gain for symmetry in self.used for gain in symmetry.blocking]

    def snapshot(self) -> Snapshot:
        self._before = Snapshot(self.movable, None if self._state is None else self._state.state)
        return self._before

    def survey(self, point: Point) -> None:
        if not self.reports:
            self.ranks.together(lambda: self._find(point))
            self._agree()
            self._take_up()
            self._first = point.by_parameter
        self.ranks.together(lambda: self._with_gains(lambda: self._look(point)))

    def _with_gains(self, work: Callable[[], _T]) -> _T:
        """Do what reads gains, and no other weights."""
        with self.weights.reading(vectors(self.model)):
            return work()

    def _find(self, point: Point) -> None:
        with_frozen = self.config.frozen_weights == "turn"
        self.reports = describe(self.model, point, self.config, with_frozen=with_frozen)
        for parameter, report in self.reports.items():
            if with_frozen and not parameter.requires_grad:
                report.reason = stays_frozen(self.weights.origin(parameter)) or report.reason
        immovable = {parameter: report.reason for parameter, report in self.reports.items() if report.reason}
        self._immovable = frozenset(map(self.weights.origin, immovable))
        known = {s.of(self.weights.stand_in): s for s in self.tracker.known(self._immovable)}
        if bool(known) and self._with_gains(lambda: all(symmetry.reason or symmetry.holds for symmetry in known)):
            self._tracked, symmetries = known, list(known)
            reasons = {self.weights.stand_in(parameter): reason for parameter, reason in self.tracker.reasons.items()}
        else:
            round_gains = self.config.blocking_gains == "round"
            symmetries, reasons = find_symmetries(
                self.model, self.loss_fn, point.batch, immovable, round_gains=round_gains, weights=self.weights
            )
        self._reasons = reasons
        for symmetry in symmetries:
            if not symmetry.reason and symmetry.kind not in self.config.symmetries:
                symmetry.reason = f"{symmetry.kind} is not among the chosen symmetries"
            if not symmetry.reason:
                symmetry.reason = self._hidden
            if self._state is not None and not symmetry.reason:
                symmetry.reason = next(filter(None, map(self._state.objection, symmetry.parameters)), "")
            if not symmetry.reason:
                symmetry.reason = frozen_objection(symmetry, self.reports)
            if not symmetry.reason:
                stored = symmetry.of(self.weights.origin)
                symmetry.reason = next(filter(None, (average.objection(stored) for average in self.tracker.averages)), "")
            self._found[symmetry] = SymmetryReport(
                symmetry.kind, symmetry.name, symmetry.blocks, symmetry.size, len(symmetry.parameters), reason=symmetry.reason
            )
        self.symmetries = list(self._found.values())
        left_out = {p: symmetry.reason for symmetry in symmetries if symmetry.reason for p in symmetry.parameters}
        for parameter, report in self.reports.items():
            report.reason = report.reason or left_out.get(parameter) or reasons.get(parameter, "")
        for parameter in self.movable:
            self.reports[parameter].movable, self.reports[parameter].reason = True, ""

    def _take_up(self) -> None:
        """Use what was gathered during training; what was found now is what training is looked at for from now on."""
        if not self._tracked:
            self._tracked = {symmetry: symmetry.of(self.weights.origin) for symmetry in self._found}
            reasons = {self.weights.origin(parameter): reason for parameter, reason in self._reasons.items()}
            self.tracker.begin(list(self._tracked.values()), reasons, self._immovable)
        self._moments = Moments(self._ordered())
        if self.tracker.seen:
            gathered = self.tracker.values
            self._moments.values = {s: gathered[own] for s, own in self._tracked.items() if own in gathered}
            self.ranks.broadcast([self._moments.values[s] for s in self._ordered() if s in self._moments.values])
        self._basis = BASES[self.config.basis](self.used, self.config.seed, self._moments)

    def _look(self, point: Point) -> None:
        if not self.tracker.seen:
            self._moments.look(self.weights.laid_out(point.by_parameter), self.weights.vote)
        self._basis.observe(point)

    def _ordered(self) -> list[Symmetry]:
        """The symmetries that will be turned, in the same order in all processes."""
        return sorted(self.used, key=self._signature)

    def _agree(self) -> None:
        """Leave out a symmetry that another process did not find with its data, so that all turn the same."""
        if self.ranks.size == 1:
            return
        own = {symmetry: self._signature(symmetry) for symmetry in self.used}
        everywhere = set.intersection(*map(set, self.ranks.gather(list(own.values()))))
        for symmetry, signature in own.items():
            if signature not in everywhere:
                self._leave_out(symmetry, "another process did not find it with its share of the data")

    def _signature(self, symmetry: Symmetry) -> tuple[Any, ...]:
        """The same in all processes for the same features of the same weights."""
        number = {parameter: i for i, parameter in enumerate(self.model.parameters())}
        parts = tuple((number[part.parameter], part.dim, *map(int, part.positions.flatten())) for part in symmetry.parts)
        return symmetry.kind, symmetry.name, symmetry.blocks, symmetry.size, hash(parts)

    def _leave_out(self, symmetry: Symmetry, reason: str) -> None:
        symmetry.reason = self._found[symmetry].reason = reason
        still = set(self.movable)
        for parameter in symmetry.parameters:
            if parameter not in still:
                self.reports[parameter].movable, self.reports[parameter].reason = False, reason

    def fit(self) -> None:
        self._basis.merge(self.ranks)
        rotations = self._rotations()
        rotations = {symmetry: matrices for symmetry, matrices in rotations.items() if not symmetry.reason}
        self._after = {s: turned(self._moments.values[s], q) for s, q in rotations.items() if self._is_turned(s)}
        for symmetry, moment in self._after.items():
            report = self._found[symmetry]
            report.misalignment = misalignment(self._moments.values[symmetry])
            report.misalignment_after = misalignment(moment)
            report.angle = mean_angle(rotations[symmetry])
        factors = self.config.second_moment == "factors"
        spread = {s: shares(moment.diagonal(dim1=-2, dim2=-1)) for s, moment in self._after.items()} if factors else {}
        self.turn = self.ranks.together(lambda: self._with_gains(lambda: Turn(rotations, spread)))

    def _is_turned(self, symmetry: Symmetry) -> bool:
        """Whether it is rotated, and its second moment is known."""
        return symmetry.kind != "scaling" and symmetry in self._moments.values

    def _rotations(self) -> dict[Symmetry, Tensor]:
        """The matrices to turn each symmetry by. One for which they are not found is left out of those that turn."""
        used = self._ordered()
        owners = self.ranks.spread([cost.work(symmetry) for symmetry in used])
        rotations = self.ranks.together(
            lambda: {s: self._chosen(s, owner == self.ranks.rank) for s, owner in zip(used, owners, strict=True)}
        )
        for (symmetry, matrices), owner in zip(rotations.items(), owners, strict=True):
            self.ranks.broadcast([matrices], source=owner)
            if not matrices.isfinite().all():
                self._leave_out(symmetry, "its second moment could not be decomposed: the algorithm did not converge")
        return rotations

    def _chosen(self, symmetry: Symmetry, own: bool) -> Tensor:
        """The matrices to turn a symmetry by; NaN where another process chooses them, or none are found."""
        try:
            if symmetry.kind == "scaling":
                return balance(symmetry, self.weights)
            if own:
                return self._basis.choose(symmetry)
        except torch.linalg.LinAlgError as error:
            logger.warning(
                "%s of %s stays as it is (%s); the others turn. If it is so in every teleport, see whether the gradients are "
                "finite, or leave it out of symmetries.",
                symmetry.kind,
                symmetry.name,
                error,
            )
        return torch.full((symmetry.blocks, symmetry.size, symmetry.size), math.nan, dtype=torch.float64)

    @property
    def aligned(self) -> bool:
        measured = [s.misalignment for s in self._found.values() if s.misalignment is not None]
        return bool(self.config.min_misalignment) and max(measured, default=0.0) < self.config.min_misalignment

    def carry_out(self) -> None:
        way = self.tracker.way
        way.frozen.release()
        known = set(way.parameters)  # if without a copy, then it was loaded turned
        way.frozen.keep(stored for stored in map(self.weights.origin, self.movable) if stored not in known)
        self.turn.carry_out(self._state, self.weights)

    def review(self, point: Point) -> None:
        if point.seed == self.config.seed and self.turn.exact:
            off = unturned(self.turn, self._first, point.by_parameter, self.weights, self.ranks)
            if any(self.ranks.gather(bool(off))):
                self._judge(off, rounding(self, point))
        self.ranks.together(lambda: self._look_again(point))

    def _look_again(self, point: Point) -> None:
        if self._state is None or self.config.second_moment != "measure":
            return
        gradients = point.by_parameter
        for part in (part for symmetry in self._ordered() if symmetry.kind != "scaling" for part in symmetry.parts):
            if part.parameter in gradients:
                rows = slices(self.weights.gathered(part.parameter, gradients[part.parameter]), part)
                squares = torch.linalg.vector_norm(rows, dim=(1, 3), dtype=torch.float64).square()
                self._squares[part] = self._squares.get(part, 0) + squares

    def _judge(self, off: dict[nn.Parameter, tuple[float, float]], moved: dict[nn.Parameter, float]) -> None:
        """A symmetry turns the gradient as it turns the weights: what does not, by more than rounding, was none."""
        for parameter, (distance, size) in off.items():
            if not distance <= ROUNDINGS * moved.get(parameter, 0.0):
                self.objection = "not_a_symmetry"
                self.tracker.forget()
                self.reports[parameter].reason = f"its gradient did not turn with it: off by {distance / max(size, 1e-30):.1e}"
                return

    def undone_on_error(self) -> AbstractContextManager[None]:
        return self.tracker.undone_on_error(map(self._tracked.__getitem__, self.turn.rotations))

    def accept(self) -> None:
        self.tracker.turned({self._tracked[symmetry]: moment for symmetry, moment in self._after.items()})
        self.tracker.way.add(self.turn, self._tracked.__getitem__)
        for parameter, values in self.tracker.way.turned_frozen().items():
            self.weights.stand_in(parameter).data.copy_(values)
        for average in self.tracker.averages:
            Turn(
                {self._tracked[symmetry].of(average): matrices for symmetry, matrices in self.turn.rotations.items()}
            ).carry_out()
        if self._state is None:
            return
        for part, squares in self._squares.items():
            sums = squares.sum(-1)
            known = ((sums > 0) & sums.isfinite()).cpu()
            if known.any():  # the batch may not have used a head, or an expert
                own = replace(part, positions=part.positions[known])
                with self.weights.changing(part.parameter, [part.dim], self._state.state):
                    self._state.put_shares(own, shares(squares[known]))
        turned = self.in_order()
        moved = [self._state.second_moment_moved(p, self._before.kept.get(p, {})) for p in turned]
        norms = self.weights.joined([norm for pair in moved for norm in pair])
        for parameter, distance, length in zip(turned, norms[::2], norms[1::2], strict=True):
            self.reports[parameter].second_moment_moved = distance / length if length else None
