"""`TeleportTrainer` and `TeleportMixin`: a Transformers Trainer that teleports, by the schedule and batches chosen here.

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
from hf_teleport.training.advice import larger_embedding_rate
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

# A type checker sees the mixin as a Trainer. At run time it can be mixed into any subclass of Trainer.
_Base: Any = Trainer if TYPE_CHECKING else object


class TeleportMixin(HomeMixin, _Base):
    """Teleportation for any `Trainer` subclass: `class MySFT(TeleportMixin, SFTTrainer): ...`.

    Settings are read when training begins, and when you call `teleport()`. They come from `teleport_config`, if you gave or
    assigned one. Otherwise they come from the `teleport_...` training arguments, with their values at that time.

    Args:
        teleport_config: the settings. Default: those of `args` if it has any, else `TeleportConfig()`.
        teleport_dataset: rows to draw teleport batches from. Default: the rows that training loads.

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
        """The current settings. Assign None to use those of the training arguments.

        Raises:
            ValueError: settings were given here, and afterwards the training arguments were changed too.
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
        """The plan of the run. Between runs: a plan with the current settings."""
        if not self._training and self._teleports.plan.config != self.teleport_config:
            last, self._teleports.plan = self._teleports.plan, Plan(replace(self.teleport_config))
            self._teleports.plan.journal, self._teleports.plan.tracker.way = last.journal, last.tracker.way
        return self._teleports.plan

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does. Raises `EmptyError` at once if the teleport data set is empty."""
        scheduled = self.teleport_config.epochs if self.teleport_config.steps is None else self.teleport_config.steps
        rows = None if self._loads_its_own_way else self.teleport_dataset
        if scheduled and isinstance(rows, Sized) and not len(rows):
            raise EmptyError
        try:
            return super().train(*args, **kwargs)
        finally:
            self._training = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A training step. Teleports first if it is the first micro-batch of a scheduled step."""
        if self._plan.due(self.state.global_step):
            if callable(getattr(self.optimizer, "train", None)):
                # In its train mode a schedule-free optimizer moves the weights. Trainer calls this only after the event.
                self.optimizer.train()
            try:
                self.teleport()
            except EmptyError as error:  # a streaming data set to teleport on has ended
                self._tell(f"No teleport before step {self.state.global_step}: {error}", logging.WARNING)
        return super().training_step(model, inputs, *args, **kwargs)

    def teleport(self) -> TeleportReport:
        """Teleport the model now, log the result, and return the report. With several methods it is the report of the last.

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
            # Not `self.log`: a subclass's own may expect the keys of training rows, and clear values that it gathers for them.
            Trainer.log(self, {f"teleport/{name}": value for name, value in report.metrics().items()})
            self.control.should_log = should_log  # logging clears it, but training's own row is still to be logged
            self._tell(f"Teleport before step {step}: {report.summary()}")
        return report

    def _teleport_on(self, teleporter: Teleporter, drawn: Drawn, step: int) -> TeleportReport:
        """Run an event. If the loss of some batches is not a number, run it again with others in their place."""
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
        """Write Trainer's model card, with a section on all teleports of this run, also those from before it was resumed."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir, "README.md"), self._plan.config, teleports(self.state.log_history))

    def _teleporter(self, plan: Plan, config: TeleportConfig, progress: Any = None) -> Teleporter:
        rates = upcoming_rates(self.lr_scheduler)
        return Teleporter(self.model, config, progress, self.optimizer, self.args.max_grad_norm, rates, plan.tracker)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint  # noted here, because the plan is made later

    def get_teleport_dataloader(self, event: int) -> Iterable[Any]:
        """Batches for the teleport before step `event`, drawn at random with a generator of their own.

        They come from `teleport_dataset`, or else from the rows that training loads. An overridden `get_train_dataloader` or
        `_get_train_sampler` decides which rows these are. Every process draws the same batches, and takes its share of each. A
        stream gives its first rows. Override this method to choose other batches.

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
        """Whether batches come from the user's own loader or sampler."""
        own = overrides(self, Trainer, "get_train_dataloader") or overrides(self, Trainer, "_get_train_sampler")
        return own and self._own_teleport_dataset is None

    def _train_loader(self) -> Any:
        """The loader that training uses now. A user's own loader may be slow to make, or may count how often it is made."""
        return self.callback_handler.train_dataloader if self._training else self.get_train_dataloader()

    def _draw(self, count: int, event: int) -> Drawn:
        """This process's share of `count` batches, and of one more that is held back."""
        shifted = getattr(self, "_loss_shifts_labels", False)
        # A collator that draws random numbers (masked language modelling) draws the same ones for the same event.
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
        # Not the subclass's own method, which may count its calls.
        return Trainer.get_batch_samples(self, iter([batch]), 1, self.args.device)[1]

    def _teleport_loss(self, model: nn.Module, batch: Any) -> Tensor:
        batch = self._prepare_inputs(batch)  # here, so that one batch at a time is on the device
        # As in training, a loss divided by the number of items gives each item of an event the same weight, in every batch.
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
        """Print a line on the first process: above the progress bars, or to the log if it is a warning or bars are disabled."""
        if not self.is_world_process_zero():
            return
        if level > logging.INFO or self.args.disable_tqdm:
            logger.log(level, line)
        else:
            tqdm.write(line)

    @property
    def _teleport_folder(self) -> str:
        """The folder of the run's files. Each trial of a hyperparameter search has its own."""
        return self._get_output_dir(getattr(self, "_trial", None))

    def _make_plan(self, train_dataloader: Any) -> Plan:
        """The plan of a run that starts or resumes: its schedule, and what can be checked before the first step.

        Raises:
            ValueError: as `Plan` and `Plan.judge`, or the trainer generates its batches.
        """
        _, steps_per_epoch, *_, max_steps = self.set_initial_training_values(self.args, train_dataloader)
        samples = self.args.train_batch_size * self.args.world_size
        course = Course(
            steps_per_epoch, max_steps, self.state.global_step, samples * self.args.gradient_accumulation_steps, samples
        )
        # A new config checks its values again, so it also checks a setting that was changed in place.
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
            new = bool(plan.upcoming) and "basis" in plan.settings.method and not loaded and not self.state.global_step
            if new and (advice := larger_embedding_rate(self.model, self.optimizer)):
                plan.notes.append((logging.INFO, advice))
        for level, line in plan.notes:
            self._tell(line, level)
        return plan

    def _candidates(self, plan: Plan) -> Iterator[Any]:
        """Batches to judge the first event by. More than one is drawn only if the first can't be used."""
        event = plan.upcoming[0]
        yield from self._draw(1, event).batches
        yield from self._draw(plan.config.num_batches, event).batches[1:]


class TeleportTrainer(TeleportMixin, Trainer):
    """A `Trainer` that teleports before scheduled steps. It takes the arguments of Trainer and of `TeleportMixin`."""
