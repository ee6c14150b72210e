"""When to teleport, and with which batches: the glue between Transformers' Trainer and the Teleporter.

-trainer = Trainer(model, TrainingArguments("out"), train_dataset=rows)
+trainer = TeleportTrainer(model, TeleportTrainingArguments("out"), train_dataset=rows)
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from hf_teleport.config import TeleportConfig
from hf_teleport.event.batches import check_given, num_samples
from hf_teleport.journal import about, teleports
from hf_teleport.report import TeleportReport
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.callback import HomeCallback, TeleportCallback
from hf_teleport.training.card import add_to_card
from hf_teleport.training.drawing import (
    Drawn,
    EmptyError,
    ReadOnceError,
    draw,
    items_per_sample,
    loader,
    overrides,
    redrawn,
    unless_read_once,
)
from hf_teleport.training.home import HomeMixin
from hf_teleport.training.plan import Course, Plan, without_a_loss
from hf_teleport.training.schedule import upcoming_rates
from hf_teleport.training.settings import Settings
from hf_teleport.weights.isolation import own_copy, preserved_generators, preserved_rng, unnoted
from hf_teleport.weights.ranks import check_strategy

logger = logging.getLogger(__name__)

_WAYS_OUT = "Pass rows that data_collator takes as teleport_dataset, or override get_teleport_dataloader to return batches."

# To a type checker the mixin is a Trainer; at run time it may be mixed into any subclass of one.
_Base: Any = Trainer if TYPE_CHECKING else object


class TeleportMixin(HomeMixin, _Base):
    """Teleportation for any `Trainer` subclass: `class MySFT(TeleportMixin, SFTTrainer): ...`.

    Settings are read when training begins, and at a teleport by hand. They are those of `teleport_config`, if one was given or
    assigned later, else the `teleport_...` training arguments as they are by then.

    Args:
        teleport_config: the settings; default: those of `args` if it has any, else `TeleportConfig()`.
        teleport_dataset: rows to draw teleport batches from; default: what training loads.

    Attributes:
        teleport_reports: one for each teleport since training last began, oldest first.

    Raises:
        ValueError: `teleport_config` and `args` both have settings, and they differ.
    """

    def __init__(
        self,
        *args: Any,
        teleport_config: TeleportConfig | None = None,
        teleport_dataset: Any = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._settings = Settings(lambda: self.args, teleport_config)
        self._own_teleport_dataset = teleport_dataset
        self.teleport_reports: list[TeleportReport] = []
        self._resumed_from: str | None = None
        self._teleports = TeleportCallback(Plan(self.teleport_config), self._make_plan)
        self._training = False
        self._items_per_sample: float | None = None
        self.add_callback(self._teleports)
        self.callback_handler.callbacks.insert(0, HomeCallback(self._end))

    @property
    def teleport_config(self) -> TeleportConfig:
        """The settings as they are now. To assign None is to go by those of the training arguments.

        Raises:
            ValueError: those of the training arguments were changed after others had been given here.
        """
        return self._settings.read()

    @teleport_config.setter
    def teleport_config(self, config: TeleportConfig | None) -> None:
        self._settings.give(config)

    @property
    def teleport_dataset(self) -> Any:
        """The rows to draw teleport batches from."""
        return self.train_dataset if self._own_teleport_dataset is None else self._own_teleport_dataset

    @teleport_dataset.setter
    def teleport_dataset(self, rows: Any) -> None:
        self._own_teleport_dataset = rows

    @property
    def _plan(self) -> Plan:
        """That of the run; between runs it is one of the settings as they are now."""
        if not self._training and self._teleports.plan.config != self.teleport_config:
            last, self._teleports.plan = self._teleports.plan, Plan(replace(self.teleport_config))
            self._teleports.plan.journal, self._teleports.plan.tracker.way = last.journal, last.tracker.way
        return self._teleports.plan

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; an empty data set to teleport on is refused at once."""
        scheduled = self.teleport_config.epochs if self.teleport_config.steps is None else self.teleport_config.steps
        rows = None if self._loads_its_own_way else self.teleport_dataset
        if scheduled and isinstance(rows, Sized) and not len(rows):
            raise EmptyError
        try:
            return super().train(*args, **kwargs)
        finally:
            self._training = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A training step; before the first micro-batch of a scheduled step, a teleport."""
        if self._plan.due(self.state.global_step):
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()  # schedule-free ones move the weights; Trainer asks for it after the event, too late
            try:
                self.teleport()
            except EmptyError as error:  # a stream of rows to teleport on that has come to its end
                self._tell(f"No teleport before step {self.state.global_step}: {error}", logging.WARNING)
        return super().training_step(model, inputs, *args, **kwargs)

    def teleport(self) -> TeleportReport:
        """Teleport the model now, log what came of it, and return the report: that of the last method, if there are several.

        Raises:
            ValueError: there is nothing to draw batches from.
        """
        step, plan = self.state.global_step, self._plan
        with preserved_rng():
            drawn = self._draw(plan.num_batches, event=step)
        if not drawn.batches:
            raise EmptyError
        if drawn.left_out:
            self._tell(f"Teleport before step {step}: {drawn.left_out} batches with no label to learn from were passed over.")
        self._take_in_averages(plan)
        for config in plan.settings.each_method():
            with self._teleport_bar(step) as progress, preserved_rng(), unnoted(self):
                teleporter = self._teleporter(plan, config, progress)
                report = self._teleport_on(teleporter, drawn, step)
            self.teleport_reports.append(report)
            plan.rate_factor = report.matched_rate
            if self.is_world_process_zero():
                run = about(teleporter.model, self.args, plan.config, plan.settled)
                plan.journal.add(self._teleport_folder, step, self.state.epoch, report, run)
            should_log = self.control.should_log
            # Trainer's own: a `log` that a subclass overrides may count on what training's rows have, and clear what it gathers.
            Trainer.log(self, {f"teleport/{name}": value for name, value in report.metrics().items()})
            self.control.should_log = should_log  # which a log clears: this one is not the one that was asked for
            self._tell(f"Teleport before step {step}: {report.summary()}")
        return report

    def _teleport_on(self, teleporter: Teleporter, drawn: Drawn, step: int) -> TeleportReport:
        """An event, and if the loss of some batches is not a number, once more with others in their places."""
        report = teleporter.teleport(drawn.batches, self._teleport_loss, drawn.held_back)
        if report.stopped_because != "non_finite" or not math.isnan(report.loss_before):
            return report
        sound, left_out = [], 0
        for batch in self._draw(self._plan.settings.num_batches, step).batches:
            if without_a_loss(teleporter.check(batch, self._teleport_loss)):
                left_out += 1
                continue
            sound.append(batch)
            if len(sound) == len(drawn.batches):
                break
        if not sound or not left_out:
            return report
        line = f"{left_out} of {left_out + len(sound)} teleport batches were left out: their loss is not a number"
        self._tell(f"{line}, as the mean over no items is not.", logging.WARNING)
        return teleporter.teleport(sound, self._teleport_loss, drawn.held_back)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with a section on the teleports of this run, those before it was resumed included."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir, "README.md"), self._plan.config, teleports(self.state.log_history))

    def _teleporter(self, plan: Plan, config: TeleportConfig, progress: Any = None) -> Teleporter:
        rates = upcoming_rates(self.lr_scheduler)
        return Teleporter(self.model, config, progress, self.optimizer, self.args.max_grad_norm, rates, plan.tracker)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint  # before the run has a plan

    def get_teleport_dataloader(self, event: int) -> Iterable[Any]:
        """Batches for the teleport before step `event`: drawn at random by a generator of their own.

        They are of `teleport_dataset`, else of what training loads: a `get_train_dataloader` or `_get_train_sampler` that is
        overridden says which rows there are. Every process draws the same batches, and takes its share of each. A stream gives
        its first rows. Override this to choose batches otherwise.

        Raises:
            ValueError: there is no data set, or training reads one that can be read only once.
        """
        config = self._plan.config
        seed = config.seed + event
        if self._loads_its_own_way:
            return redrawn(unless_read_once(self._train_loader()), config.batch_size, self.args.world_size, seed)
        if self._own_teleport_dataset is None:
            unless_read_once(self.train_dataset)
        dataset, collator = own_copy(self.teleport_dataset), own_copy(self.data_collator)
        if dataset is None:
            raise EmptyError
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="teleport")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="teleport")
        return loader(dataset, collator, config.batch_size or self._train_batch_size * self.args.world_size, seed)

    @property
    def _loads_its_own_way(self) -> bool:
        """Whether batches are those of a loader or sampler of the user's own."""
        own = overrides(self, Trainer, "get_train_dataloader") or overrides(self, Trainer, "_get_train_sampler")
        return own and self._own_teleport_dataset is None

    def _train_loader(self) -> Any:
        """The one that training goes through now, for a user's own may be dear to make or count its calls."""
        return self.callback_handler.train_dataloader if self._training else self.get_train_dataloader()

    def _draw(self, count: int, event: int) -> Drawn:
        """This process's share of so many batches, and of one more to hold back."""
        shifted = getattr(self, "_loss_shifts_labels", False)
        # Collators that draw random numbers (masked language modelling) draw the same for the same event.
        torch.manual_seed(self._plan.config.seed + event)
        with preserved_generators(self):
            try:
                batches = self.get_teleport_dataloader(event)
                drawn = draw(batches, count, self.args.process_index, self.args.world_size, shifted)
            except Exception as error:
                error.add_note(f"Teleport batches were being drawn. {_WAYS_OUT}")
                raise
        counts = [self._num_items(batch) for batch in drawn.batches]
        self._items_per_sample = None if self.args.n_gpu > 1 else items_per_sample(drawn.batches, counts)
        return drawn

    def _num_items(self, batch: Any) -> Any:
        # Trainer's own: a method that a subclass overrides may count its calls.
        return Trainer.get_batch_samples(self, iter([batch]), 1, self.args.device)[1]

    def _teleport_loss(self, model: nn.Module, batch: Any) -> Tensor:
        batch = self._prepare_inputs(batch)  # here, so that one batch at a time is on the device
        # As in training: a loss that is divided by a number of items counts each item of an event alike, in whichever batch.
        count, samples = self._num_items(batch), num_samples(batch)
        if count is not None and self._items_per_sample is not None and samples is not None:
            count = torch.full_like(count, self._items_per_sample * samples, dtype=torch.float32)
        # compute_loss may take the labels out of the batch.
        return self.compute_loss(model, dict(batch) if isinstance(batch, Mapping) else batch, num_items_in_batch=count)

    @contextmanager
    def _teleport_bar(self, at: int) -> Iterator[Any]:
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(desc=f"Teleport (step {at})", unit="step", leave=False, disable=hidden) as bar:

            def progress(step: int, total: int) -> None:
                bar.total = total
                bar.update(step - bar.n)

            yield progress

    def _tell(self, line: str, level: int = logging.INFO) -> None:
        """Say something once: beside the bars, or to the log if it is a warning or no bars are shown."""
        if not self.is_world_process_zero():
            return
        if level > logging.INFO or self.args.disable_tqdm:
            logger.log(level, line)
        else:
            tqdm.write(line)

    @property
    def _teleport_folder(self) -> str:
        """Where the run's files are; each trial of a hyperparameter search has a folder of its own."""
        return self._get_output_dir(getattr(self, "_trial", None))

    def _make_plan(self, train_dataloader: Any) -> Plan:
        """The plan of a run that begins, or goes on: its schedule, and what can be found out before the first step.

        Raises:
            ValueError: as `Plan` and `Plan.judge`; or batches that are generated.
        """
        _, steps_per_epoch, *_, max_steps = self.set_initial_training_values(self.args, train_dataloader)
        samples = self.args.train_batch_size * self.args.world_size
        course = Course(
            steps_per_epoch, max_steps, self.state.global_step, samples * self.args.gradient_accumulation_steps, samples
        )
        # Made anew, so that a setting that was changed in place is looked at too.
        plan = Plan(replace(self.teleport_config), course, self.state.log_history, self._settings.prefix)
        plan.journal.begin(self._teleport_folder, self.state.log_history)
        loaded = bool(getattr(self.model, "name_or_path", "")) or plan.config.frozen_weights == "turn"
        plan.turns_back |= plan.config.turn_back == "auto" and loaded
        if self._resumed_from is not None:
            self._teleports.plan.tracker.way.frozen.restore()
            plan.load(self._resumed_from, self.model)
        elif self._teleports.plan.tracker.way.within(self.model.parameters()):
            plan.tracker.way = self._teleports.plan.tracker.way
        self.teleport_reports = []
        self._teleports.plan, self._training = plan, True
        if plan.upcoming:
            check_strategy(self.accelerator)
            check_given(type(self))
            self._take_in_averages(plan)
            try:
                with preserved_rng(), unnoted(self):
                    plan.judge(self._candidates(plan), partial(self._teleporter, plan), self._teleport_loss)
            except ReadOnceError as error:
                plan.give_up(f"No teleports: {error}")
        for level, line in plan.notes:
            self._tell(line, level)
        return plan

    def _candidates(self, plan: Plan) -> Iterator[Any]:
        """Batches to judge the first event by; more than one is drawn only if the first is of no use."""
        event = plan.upcoming[0]
        yield from self._draw(1, event).batches
        yield from self._draw(plan.config.num_batches, event).batches[1:]


class TeleportTrainer(TeleportMixin, Trainer):
    """`Trainer` that teleports before scheduled epochs. All of Trainer's arguments, and those of `TeleportMixin`."""
