"""Teleport any module with any scalar loss. Knows neither the Trainer nor the schedule."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from accelerate.utils import convert_to_fp32, extract_model_from_parallel
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.event.batches import halved
from hf_teleport.event.check import Check
from hf_teleport.event.choice import BASIS_STEP, choose
from hf_teleport.event.cost import Cost
from hf_teleport.event.event import Event
from hf_teleport.event.home import turn_back
from hf_teleport.event.reasons import NO_STEP
from hf_teleport.layers.point import LossFn
from hf_teleport.methods import METHODS, BasisTurn, ClimbingMethod, NullSpace, TurningMethod
from hf_teleport.methods.basis.averages import taken_in
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.methods.null_space.objectives import OBJECTIVES
from hf_teleport.optimizers.parts import states, steps_copies
from hf_teleport.optimizers.rehearsal import Rehearsal, RehearsalError
from hf_teleport.report import SymmetryReport, TeleportReport
from hf_teleport.settings.groups import reads
from hf_teleport.weights.isolation import isolated, preserved_rng
from hf_teleport.weights.ranks import Ranks, out_of_memory
from hf_teleport.weights.storage import is_low
from hf_teleport.weights.whole import Weights

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Teleporter:
    """Teleports any `nn.Module` with any scalar loss.

    Args:
        model: its parameters with `requires_grad` are teleported, in place. A compiled one, or one wrapped by DDP, is unwrapped.
        config: the settings; `epochs`, `warmup_steps` and `batch_size` are for the trainer and are not read here.
        optimizer: the one that trains the model. A change of basis turns its state along; without it only the weights turn.
            Objectives about its next step need it.
        progress: called after each step with the number of steps taken and the most there can be.
        tracker: gathers second moments from training steps for method 'basis'; default: a new one, that looks when it is told to.
        max_grad_norm, rates: of training, as `Rehearsal` takes them, for what looks at the optimizer's next steps.

    Example:
        >>> report = Teleporter(model, TeleportConfig()).teleport(batches, lambda model, batch: model(**batch).loss)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TeleportConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
        optimizer: Any = None,
        max_grad_norm: float | None = None,
        rates: Callable[[int], list[float]] | None = None,
        tracker: Tracker | None = None,
    ):
        self.model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.config = config or TeleportConfig()
        self.optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._rates = rates
        follows = reads(self.config.method, "track_every")
        self.tracker = tracker or (Tracker(self.config.track_every, self.config.track_decay) if follows else Tracker())
        self._progress = progress or (lambda step, total: None)
        self._averages: tuple[nn.Module | Mapping[str, Tensor], ...] = ()
        self._ranks = Ranks(next((p.device for p in model.parameters()), "cpu"))

    def teleport(self, batches: Iterable[Any], loss_fn: LossFn, held_back: Any = None) -> TeleportReport:
        """Move the weights inside the level set of the loss on these batches (Algorithm 1 of the paper).

        Modes, buffers, gradients and random states are afterwards what they were. Whatever goes wrong, the weights
        are either teleported within `max_loss_change`, or bit for bit what they were. If memory runs out, it is tried again with
        twice as many batches of half the size.

        With several processes (`torch.distributed` is initialized), all of them must call this, each with its own share of
        every batch, equally many samples each. They end with equal weights.

        Args:
            batches: whatever `loss_fn` takes; all of them are used, `config.num_batches` is for the trainer.
            loss_fn: `loss_fn(model, batch)` gives the mean loss of a batch, a scalar.
            held_back: a batch that takes no part, and whose loss is watched: a move that changes it too far is halved or undone.

        Returns:
            What was done, for each layer too: by the last method, if `config.method` names several.

        Raises:
            ValueError: no batch, a batch that is not in a list, a loss that is no scalar or has no gradient, or a target module
                that matches nothing. The weights are untouched.
        """
        start = time.perf_counter()
        if isinstance(batches, Mapping):
            raise ValueError(f"batches = a {type(batches).__name__} is not allowed; allowed: a list of batches, such as [batch].")
        with preserved_rng():
            batches = list(batches)
        if not batches:
            raise ValueError("there are no teleport batches: pass at least one batch of data to teleport on.")
        self._settle(batches[0], loss_fn)
        self._take_in_averages()
        reports = []
        for config in self.config.each_method():
            reports.append(self._with(config)._by_one_method(batches, loss_fn, held_back, start))
            start = time.perf_counter()
        return reports[-1]

    def _by_one_method(self, batches: list[Any], loss_fn: LossFn, held_back: Any, start: float) -> TeleportReport:
        while True:
            report = self._unless_memory_runs_out(partial(self._event, batches, loss_fn, held_back, start))
            if report is not None:
                return report
            smaller = halved(batches)
            if smaller is None:
                logger.warning("The teleport changed nothing: %s.", NO_STEP["out_of_memory"])
                nan = math.nan
                seconds = time.perf_counter() - start
                return TeleportReport(self.config.method, nan, nan, nan, nan, 0, "out_of_memory", True, seconds)
            logger.warning(
                "Memory ran out in a teleport, which was undone; it is tried again with batches of half the size. A smaller "
                "batch_size saves the first try."
            )
            batches, held_back = smaller, None if held_back is None else (halved([held_back]) or [None])[0]

    def turn_back(self) -> list[SymmetryReport]:
        """Bring the weights, and the optimizer's state, back into the coordinates in which they were before the first turn.

        The function stays, and so does what training has learned. Every change of basis is undone, and each norm gets back the
        gain that it had when it was folded ([how](docs/basis.md#the-way-home)). Nothing happens if nothing was turned.

        With several processes, all of them must call this.

        Returns:
            What had been turned. A symmetry with a reason stays turned, and a later call may bring it back.
        """
        self._take_in_averages()
        return turn_back(self.model, self.config, self.tracker, self.optimizer, self._state, self._ranks)

    def register_average(self, *averages: nn.Module | Mapping[str, Tensor]) -> None:
        """Turn averages of the weights (EMA, SWA) along with the weights; they take the place of those registered before.

        Args:
            averages: modules with the model's parameters (`AveragedModel`), or tensors by the names of `named_parameters`, which
                are changed in place.

        Raises:
            ValueError: a trained parameter is missing in one, has another shape, or is sharded.
        """
        self._averages = averages
        self.tracker.averages = taken_in(self.model, averages)
        self.tracker.forget()  # a symmetry that an earlier average held back may turn now

    def _take_in_averages(self) -> None:
        if self._averages:  # again before each event: a dict may have other tensors now
            self.tracker.averages = taken_in(self.model, self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed loop needs besides weights and optimizer: the way back, and second moments gathered from training steps.

        `accelerator.register_for_checkpointing(teleporter)` saves it with everything else.
        """
        return self.tracker.saved(self.model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `state_dict` returned.

        Raises:
            ValueError: it is of another model.
        """
        self.tracker.load(state, self.model)

    def check(self, batch: Any, loss_fn: LossFn) -> Check:
        """What a teleport on this batch could move, without moving anything.

        Raises:
            ValueError: as `teleport`, and for several methods; `Check.require_movable` raises if nothing may move.
        """
        if len(self.config.each_method()) > 1:
            raise ValueError(
                f"method = {self.config.method!r} is not allowed for a check; allowed: a single method. Check each of "
                "config.each_method()."
            )
        self._settle(batch, loss_fn)
        batches = [batch]
        while True:
            found = self._unless_memory_runs_out(partial(self._judge, batches[0], loss_fn))
            if found is not None:
                return found
            batches = halved(batches[:1]) or []
            if not batches:
                return Check(math.nan, NO_STEP["out_of_memory"])

    def choose(self, batch: Any, loss_fn: LossFn, basis_step: int = BASIS_STEP) -> tuple[TeleportConfig, str]:
        """What method 'auto' comes to on this batch, and why not 'basis' (`hf_teleport.event.choice.choose`).

        Raises:
            ValueError: as `check`.
        """
        return choose(self.config, self.optimizer, lambda config: self._with(config).check(batch, loss_fn), basis_step)

    def _settle(self, batch: Any, loss_fn: LossFn) -> None:
        if self.config.method == "auto":
            self.config, _ = self.choose(batch, loss_fn)

    def _with(self, config: TeleportConfig) -> "Teleporter":
        other = copy.copy(self)
        other.config = config
        return other

    def _judge(self, batch: Any, loss_fn: LossFn) -> Check:
        loss_fn = self._on_float32(loss_fn)
        with self._isolated() as weights:
            method = self._method(loss_fn, weights)
            point = method.evaluate(batch, self.config.seed)
            if not point.finite:
                return Check(point.loss, f"the loss on a teleport batch is {point.loss}; {NO_STEP['non_finite']}")
            method.survey(point)
            cost = Cost.of(method, batch, point)
            found = Check(point.loss, "", list(method.reports.values()), cost=cost)
            if isinstance(method, TurningMethod):
                found.symmetries = method.symmetries
                found.blocking = [weights.origin(parameter) for parameter in method.blocking]
            return found

    def _isolated(self) -> AbstractContextManager[Weights]:
        if self.config.method == "basis" and self.config.frozen_weights == "turn":
            self.tracker.way.frozen.untie(self.model)
        return isolated(self.model, self._state, self._ranks, METHODS[self.config.method].on_shards(self.config))

    def _unless_memory_runs_out(self, work: Callable[[], _T]) -> _T | None:
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Outside the handler: the error holds the frames, and they the tensors.
        clear_device_cache(garbage_collection=True)
        return None

    def _on_float32(self, loss_fn: LossFn) -> LossFn:
        """The loss on float32 weights, if some are stored in less."""
        if not is_low(self.model):
            return loss_fn
        return lambda model, batch: loss_fn(model, convert_to_fp32(batch))

    def _event(self, batches: list[Any], loss_fn: LossFn, held_back: Any, start: float) -> TeleportReport:
        loss_fn = self._on_float32(loss_fn)
        with self._isolated() as weights:
            method = self._method(loss_fn, weights)
            return Event(method, self._progress, start).run(batches, held_back)

    @property
    def _state(self) -> MutableMapping[Any, Any]:
        return {} if self.optimizer is None else states(self.optimizer)

    def _method(self, loss_fn: LossFn, weights: Weights) -> ClimbingMethod | TurningMethod:
        if self.optimizer is not None and (why := steps_copies(self.optimizer, map(weights.origin, self.model.parameters()))):
            raise RehearsalError(
                f"{why}, so a teleport would be undone by its next step. Give the optimizer the model's own parameters, or train "
                "with plain Trainer."
            )
        method = METHODS[self.config.method](self.model, loss_fn, self.config, self.optimizer, weights)
        if isinstance(method, BasisTurn):
            method.tracker = self.tracker
        about_steps = isinstance(method, NullSpace) and OBJECTIVES[self.config.objective].needs_optimizer
        if self.optimizer is not None and (about_steps or self.config.rehearsal_steps):
            method.rehearsal = Rehearsal(self.optimizer, weights.origin, self._max_grad_norm, self._rates, self._ranks)
        return method
