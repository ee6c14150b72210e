"""The plan of a run's teleports, made before its first step: the schedule, the settings, and the parameters to hold still."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.display.quantities import duration
from hf_teleport.event.check import Check
from hf_teleport.event.choice import BASIS_STEP, afford
from hf_teleport.event.cost import cost_warning, event_passes
from hf_teleport.event.reasons import NO_STEP
from hf_teleport.journal import Journal, teleports
from hf_teleport.layers.point import LossFn
from hf_teleport.layers.roles import names_of_parameters, parameters_by_name
from hf_teleport.methods.basis import BasisTurn
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.methods.basis.way import Way
from hf_teleport.optimizers.rehearsal import RehearsalError
from hf_teleport.optimizers.state import keeps_copies, unwrapped
from hf_teleport.report import share
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.drawing import EmptyError
from hf_teleport.training.schedule import teleport_steps

# The file beside saved weights that are turned, and in a checkpoint's folder.
TRACKED = "teleport.safetensors"
# Prefix in that file for trained weights in turned coordinates, if the model beside it is saved turned back.
_TURNED = "turned/"


@dataclass(frozen=True)
class Course:
    """The length of a run.

    Attributes:
        steps_per_epoch, max_steps: optimizer steps in an epoch and in the whole run.
        start: the first step. It is above 0 if the run is resumed.
        step_samples: samples in an optimizer step, over all processes and accumulated batches.
        batch_samples: samples in a training batch, over all processes.
    """

    steps_per_epoch: int
    max_steps: int
    start: int
    step_samples: int
    batch_samples: int


class Plan:
    """A run's teleports. The trainer makes it when training begins, and `TeleportCallback` carries it out between steps.

    A resumed run gets the same plan.

    Args:
        config: the settings that the user asked for.
        course: the length of the run. None: there is no run and no schedule, only calls of `teleport()`.
        log_history: the log of the run from before it was resumed.
        prefix: a prefix for names of settings in messages, if the user gave them as training arguments.

    Attributes:
        settled: the settings that method 'auto' chose. None: it has not chosen, or the method is not 'auto'.
        steps: the schedule, `{step: epoch}`. An event comes just before its step.
        held: parameters that are not trained until the last event, or to the end if the run turns back.
        turns_back: whether the run ends in the coordinates in which it began.
        tracker: keeps the run's symmetries and the second moments of its gradients.
        rate_factor: a factor for the learning rate until the next epoch.
        notes: lines to print before the first step, each with its logging level.
        journal: the events of this run.

    Raises:
        ValueError: an impossible schedule.
    """

    def __init__(
        self,
        config: TeleportConfig,
        course: Course | None = None,
        log_history: Iterable[dict[str, Any]] = (),
        prefix: str = "",
    ):
        self.config = config
        self.settled: TeleportConfig | None = None
        self.steps: dict[int, int] = {}
        self.held: list[nn.Parameter] = []
        self.turns_back = config.turn_back == "end"
        self.tracker = Tracker(config.track_every, config.track_decay)
        self.rate_factor = 1.0
        self.notes: list[tuple[int, str]] = []
        self.journal = Journal()
        self._course = course
        self._prefix = prefix
        self._seen = -1
        if course is None:
            return
        # The first change of basis comes at step 10, or earlier if an epoch or the run is short.
        self._basis_step = min(BASIS_STEP, course.steps_per_epoch // 2, course.max_steps // 2)
        planned = config
        if config.method == "auto":  # plan for 'basis': no other method that it may choose has later events
            planned = replace(config.for_method("basis"), warmup_steps=max(config.warmup_steps, self._basis_step))
        self.steps = teleport_steps(planned, course.steps_per_epoch, course.max_steps, prefix)
        epoch = course.start // course.steps_per_epoch * course.steps_per_epoch
        # If the run is resumed within an epoch, the last event of that epoch may have set a factor.
        for event in teleports(log_history):
            if event["step"] >= epoch:
                self.rate_factor = event.get("matched_rate", 1.0)

    @property
    def settings(self) -> TeleportConfig:
        """The settings in use: those that method 'auto' chose, or those that the user asked for."""
        return self.settled or self.config

    @property
    def upcoming(self) -> list[int]:
        """The steps of the events that still lie ahead when the run starts or resumes."""
        return sorted(step for step in self.steps if self._course is not None and step >= self._course.start)

    def _of_run(self) -> Course:
        if self._course is None:
            raise RuntimeError("this plan is for teleports by hand: it has no run to judge.")
        return self._course

    def due(self, step: int) -> bool:
        """Whether an event comes before this step. True only once, because a step has several batches with accumulation."""
        new, self._seen = step != self._seen, step
        return new and step in self.steps

    def missed(self, step: int) -> bool:
        """Whether an event was to come before this step, and nobody has asked if it is due."""
        return step in self.steps and step != self._seen

    def holds(self, step: int) -> list[nn.Parameter]:
        """The parameters that this step must not train."""
        # Gains are held after the last turn too if the run turns back, because an uneven gain would prevent that.
        return self.held if self.held and (self.turns_back or step < max(self.steps, default=0)) else []

    def look(self, step: int) -> None:
        """Read the gradients of this optimizer step, if a change of basis still lies ahead."""
        if "basis" in self.settings.method and step < max(self.steps, default=0):
            self.tracker.look(step)

    @property
    def num_batches(self) -> int:
        """Number of batches of an event. A basis that follows training's gradients needs only one, for its check."""
        told = self.settings.method == "basis" and BasisTurn.is_told(self.settings) and self.tracker.seen
        return 1 if told else self.settings.num_batches

    def saves_at_home(self, model: nn.Module) -> bool:
        """Whether adapters are turned back for saving. Their base turns in memory only, so they must fit the original base."""
        way = self.tracker.way
        adapters = hasattr(model, "peft_config") and bool(way.frozen.originals)
        return adapters and not way.staying(names_of_parameters(model))

    def save(self, folder: str | Path, model: nn.Module, step: int | None = None) -> None:
        """Write a file beside saved weights: what is needed to turn them back, and in a checkpoint also to resume.

        Args:
            model: the model whose weights were saved.
            step: for a checkpoint, the step from which a resumed run goes on.
        """
        way, names = self.tracker.way, names_of_parameters(model)
        home = self.saves_at_home(model)
        state = {} if home and step is None else way.state_dict(names)
        if home and step is not None:
            trained = [parameter for parameter in way.parameters if parameter.requires_grad]
            state |= {f"{_TURNED}{names[parameter]}": parameter.detach().contiguous() for parameter in trained}
        if step is not None and step <= max(self.steps, default=-1):
            state |= self.tracker.state_dict()
        path = Path(folder, TRACKED)
        if state:
            save_file(state, path)
        else:
            path.unlink(missing_ok=True)  # it would belong to weights that were saved there before

    @torch.no_grad()
    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Load the file that was saved beside the weights. If there is none, the weights were never turned.

        Raises:
            ValueError: the file belongs to another model.
        """
        frozen = self.tracker.way.frozen
        if self.config.frozen_weights == "turn":
            frozen.untie(model)
        state, named = _saved(folder), parameters_by_name(model)
        self.tracker.load({name: value for name, value in state.items() if not name.startswith(_TURNED)}, model)
        if turned := {name.removeprefix(_TURNED): value for name, value in state.items() if name.startswith(_TURNED)}:
            # Base and adapters were loaded turned back. Turn the base, and take the turned adapters from the file.
            frozen.keep(self.tracker.way.parameters)
            for parameter, values in self.tracker.way.turned_frozen().items():
                parameter.copy_(values)
            for name, value in turned.items():
                named[name].copy_(value)

    def give_up(self, why: str) -> None:
        """Continue the run without teleports, and note why."""
        self.steps = {}
        self._warn(why)

    def judge(self, batches: Iterable[Any], teleporter: Callable[[TeleportConfig], Teleporter], loss_fn: LossFn) -> None:
        """Check on a batch whether the events can work and what they cost, and note what to tell the user.

        Args:
            batches: the check uses the first batch whose loss is a number. A mean over no items, for instance, is not.
            teleporter: makes a `Teleporter` for the run's model and optimizer.

        Raises:
            ValueError: there is no batch, the loss can't be teleported, a target module matches nothing, or no weight may
                move. Also if a change of basis does not suit the optimizer.
        """
        course = self._of_run()
        auto, checks, start = self.config.method == "auto", [], time.perf_counter()
        for batch in batches:
            start = time.perf_counter()
            self.notes = []
            # This is checked even if 'auto' finds teleports too expensive, so that errors in settings or loss show up now.
            try:
                if auto:
                    self._settle(teleporter(self.config), batch, loss_fn, course)
                checks = [teleporter(config).check(batch, loss_fn) for config in self.settings.each_method()]
            except RehearsalError as error:
                if not auto:
                    raise
                self.give_up(f"Method 'auto': no teleports, because {error}")
                return
            if not any(without_a_loss(check) for check in checks):
                break
        if not checks:
            raise EmptyError
        seconds = time.perf_counter() - start
        if not self.upcoming:
            return
        if auto and checks[0].immovable:
            self.give_up(f"Method 'auto': no teleports, because {checks[0].immovable}.")
            return
        if not course.start:  # a resumed run has begun, and its events would only warn
            for check in checks:
                check.require_movable()
        if self.settings.blocking_gains == "hold":
            self.held = [parameter for check in checks for parameter in check.blocking]
        self._describe(checks, seconds, teleporter(self.config).optimizer, course)

    def _settle(self, teleporter: Teleporter, batch: Any, loss_fn: LossFn, course: Course) -> None:
        """Choose settings and schedule for method 'auto'."""
        chosen, why = teleporter.choose(batch, loss_fn, self._basis_step)
        steps = teleport_steps(chosen, course.steps_per_epoch, course.max_steps, self._prefix)
        budget = self.config.budget
        affordable = afford(chosen, budget, len(steps), self._passes(course.max_steps, course))
        self.settled = affordable or chosen
        self.steps = {} if affordable is None else steps
        if not why:
            return
        said = f"Method 'auto': no change of basis ({why});"
        if affordable:
            kept = f"kept if the next {chosen.rehearsal_steps} steps end lower with it"
            self.notes.append((logging.INFO, f"{said} 'null_space' instead, {kept}."))
        else:
            self._warn(f"{said} no teleports, because one takes more than {budget:.0%} of so short a run (teleport_budget).")

    def _describe(self, checks: list[Check], seconds: float, optimizer: Any, course: Course) -> None:
        """Note what may move and what it costs, and add warnings."""
        if keeps_copies(optimizer):
            self._warn(
                f"{type(unwrapped(optimizer)).__name__} seems to keep copies of the weights. These do not follow a teleport, and "
                "pull the weights back. Use an optimizer without copies, such as AdamW."
            )
        if problems := [check.problem for check in checks if check.problem]:
            self._warn(f"Teleports will be skipped as long as this lasts: {problems[0]}.")
            return
        for config, check in zip(self.settings.each_method(), checks, strict=True):
            elements = share(check.layers, lambda layer: layer.movable)
            line = (
                f"Teleports ({config.method}) before steps {_shortened(self.upcoming)}: "
                f"{sum(layer.movable for layer in check.layers)} of {len(check.layers)} weights ({elements:.0%} of the elements) "
                f"may move. An event makes at most {event_passes(config)} passes over a teleport batch: it may take "
                f"{check.cost}. The check took {duration(seconds)}."
            )
            self.notes.append((logging.INFO, line))
        if self.held:
            until = "the run ends" if self.turns_back else "the last teleport"
            self.notes.append((logging.INFO, f"Gains that are not trained until {until} (blocking_gains): {len(self.held)}."))
        passes = self._passes(course.max_steps - course.start, course)
        looks = len([step for step in range(course.start, max(self.upcoming)) if self.tracker.looks_at(step)])
        if line := cost_warning([check.cost for check in checks], len(self.upcoming), passes, looks):
            self._warn(line)

    def _passes(self, steps: int, course: Course) -> float:
        """The length of this many training steps, in passes over a teleport batch."""
        return steps * course.step_samples / (self.settings.batch_size or course.batch_samples)

    def _warn(self, line: str) -> None:
        self.notes.append((logging.WARNING, line))


def load_way(folder: str | Path, model: nn.Module) -> Way:
    """Load the changes of basis that saved weights have gone through. Empty: they were never turned, or saved turned back.

    Args:
        folder: the folder of the saved weights.
        model: the model that has these weights.

    Raises:
        ValueError: the file belongs to another model, or is broken.
    """
    state = _saved(folder)
    if any(name.startswith(_TURNED) for name in state):
        return Way()
    return Way.from_state_dict(state, parameters_by_name(model))


def _saved(folder: str | Path) -> dict[str, Tensor]:
    path = Path(folder, TRACKED)
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or broken: {error}. Copy it again from where the run wrote it.") from error


def without_a_loss(check: Check) -> bool:
    """Whether the loss on the batch is not a number, for instance because it is a mean over no items."""
    return math.isnan(check.loss) and check.problem != NO_STEP["out_of_memory"]


def _shortened(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:6], "...", steps[-1]]))
