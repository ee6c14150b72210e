"""When to teleport, and with which batches: the glue between Transformers' Trainer and the Teleporter.

-trainer = Trainer(model, TrainingArguments("out"), train_dataset=rows)
+trainer = TeleportTrainer(model, TeleportTrainingArguments("out"), train_dataset=rows)
"""

import logging
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer

from hf_teleport.arguments import TeleportArguments
from hf_teleport.config import TeleportConfig
from hf_teleport.event.batches import check_given
from hf_teleport.journal import about, teleports
from hf_teleport.report import TeleportReport
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.callback import TeleportCallback
from hf_teleport.training.card import add_to_card
from hf_teleport.training.drawing import draw, loader
from hf_teleport.training.plan import Course, Plan
from hf_teleport.training.schedule import upcoming_rates
from hf_teleport.weights.isolation import own_copy, preserved_rng, unnoted
from hf_teleport.weights.ranks import check_strategy

logger = logging.getLogger(__name__)

_EMPTY = "the data set to teleport on is empty: pass rows as train_dataset or teleport_dataset, or use plain Trainer."

# To a type checker the mixin is a Trainer; at run time it may be mixed into any subclass of one.
_Base: Any = Trainer if TYPE_CHECKING else object


class TeleportMixin(_Base):
    """Teleportation for any `Trainer` subclass: `class MySFT(TeleportMixin, SFTTrainer): ...`.

    Args:
        teleport_config: the settings; default: those of `args` if it has any, else `TeleportConfig()`.
        teleport_dataset: rows to draw teleport batches from; default: the training set.

    Attributes:
        teleport_reports: one for each teleport of this run, oldest first.

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
        own = self.args.teleport_config() if isinstance(self.args, TeleportArguments) else TeleportConfig()
        if teleport_config is not None and own not in (TeleportConfig(), teleport_config):
            raise ValueError(
                f"teleport settings are given twice, as {teleport_config.as_python()} and in the training "
                f"arguments, {own.as_python()}: leave one of them out."
            )
        self.teleport_config = teleport_config or own
        self._own_teleport_dataset = teleport_dataset
        self.teleport_reports: list[TeleportReport] = []
        self._resumed_from: str | None = None
        self._teleports = TeleportCallback(Plan(self.teleport_config), self._make_plan)
        self.add_callback(self._teleports)

    @property
    def teleport_dataset(self) -> Any:
        """The rows to draw teleport batches from."""
        return self.train_dataset if self._own_teleport_dataset is None else self._own_teleport_dataset

    @teleport_dataset.setter
    def teleport_dataset(self, rows: Any) -> None:
        self._own_teleport_dataset = rows

    @property
    def _plan(self) -> Plan:
        return self._teleports.plan

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; an empty data set to teleport on is refused at once."""
        scheduled = self.teleport_config.epochs if self.teleport_config.steps is None else self.teleport_config.steps
        if scheduled and isinstance(self.teleport_dataset, Sized) and not len(self.teleport_dataset):
            raise ValueError(_EMPTY)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A training step; before the first micro-batch of a scheduled step, a teleport."""
        if self._plan.due(self.state.global_step):
            self.teleport()
        return super().training_step(model, inputs, *args, **kwargs)

    def teleport(self) -> TeleportReport:
        """Teleport the model now, log what came of it, and return the report: that of the last method, if there are several."""
        step, plan = self.state.global_step, self._plan
        with preserved_rng():
            batches, held_back = self._teleport_batches(plan.num_batches, event=step)
        for config in plan.settings.each_method():
            with self._teleport_bar(step) as progress, preserved_rng():
                teleporter = self._teleporter(plan, config, progress)
                report = teleporter.teleport(batches, self._teleport_loss, held_back)
            self.teleport_reports.append(report)
            plan.rate_factor = report.matched_rate
            if self.is_world_process_zero():
                run = about(teleporter.model, self.args, plan.config, plan.settled)
                plan.journal.add(self.args.output_dir, step, self.state.epoch, report, run)
            should_log = self.control.should_log
            with unnoted(self):
                self.log({f"teleport/{name}": value for name, value in report.metrics().items()})
            self.control.should_log = should_log  # which a log clears: this one is not the one that was asked for
            self._tell(f"Teleport before step {step}: {report.summary()}")
        return report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with a section on the teleports of this run, those before it was resumed included."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir, "README.md"), self.teleport_config, teleports(self.state.log_history))

    def _teleporter(self, plan: Plan, config: TeleportConfig, progress: Any = None) -> Teleporter:
        rates = upcoming_rates(self.lr_scheduler)
        return Teleporter(self.model, config, progress, self.optimizer, self.args.max_grad_norm, rates, plan.tracker)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._plan.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint  # before the run has a plan

    def get_teleport_dataloader(self, event: int) -> DataLoader:
        """Batches for the teleport before step `event`: drawn at random by a generator of their own.

        Every process draws the same batches, and takes its share of each. A stream gives its first rows; one that can be
        read only once needs a `teleport_dataset` beside it. Override this to choose batches otherwise.

        Raises:
            ValueError: there is no data set.
        """
        dataset, collator = own_copy(self.teleport_dataset), own_copy(self.data_collator)
        if dataset is None:
            raise ValueError(_EMPTY)
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="teleport")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="teleport")
        batch_size = self.teleport_config.batch_size or self._train_batch_size * self.args.world_size
        return loader(dataset, collator, batch_size, seed=self.teleport_config.seed + event)

    def _teleport_batches(self, count: int, event: int) -> tuple[list[Any], Any]:
        """This process's share of so many batches, and of one more to hold back: None if the data gives no more."""
        # Collators that draw random numbers (masked language modelling) draw the same for the same event.
        torch.manual_seed(self.teleport_config.seed + event)
        return draw(self.get_teleport_dataloader(event), count, self.args.process_index, self.args.world_size)

    def _teleport_loss(self, model: nn.Module, batch: Any) -> Tensor:
        batch = self._prepare_inputs(batch)  # here, so that one batch at a time is on the device
        # As in training: the loss is a mean over the batch's items, and compute_loss may take the labels out of the batch.
        _, count = self.get_batch_samples(iter([batch]), 1, self.args.device)
        with unnoted(self):
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

    def _make_plan(self, train_dataloader: Any) -> Plan:
        """The plan of a run that begins, or goes on: its schedule, and what can be found out before the first step.

        Raises:
            ValueError: as `Plan` and `Plan.judge`; an empty data set, or batches that are generated.
        """
        _, steps_per_epoch, *_, max_steps = self.set_initial_training_values(self.args, train_dataloader)
        samples = self.args.train_batch_size * self.args.world_size
        course = Course(
            steps_per_epoch, max_steps, self.state.global_step, samples * self.args.gradient_accumulation_steps, samples
        )
        plan = Plan(self.teleport_config, course, self.state.log_history)
        plan.journal.begin(self.args.output_dir, self.state.log_history)
        if self._resumed_from is not None:
            plan.load(self._resumed_from)
        if plan.upcoming:
            check_strategy(self.accelerator)
            check_given(type(self))
            with preserved_rng():
                batches, _ = self._teleport_batches(1, event=plan.upcoming[0])
                if not batches:
                    raise ValueError(_EMPTY)
                plan.judge(batches[0], partial(self._teleporter, plan), self._teleport_loss)
        for level, line in plan.notes:
            self._tell(line, level)
        return plan


class TeleportTrainer(TeleportMixin, Trainer):
    """`Trainer` that teleports before scheduled epochs. All of Trainer's arguments, and those of `TeleportMixin`."""
