"""When to teleport, and with which batches: the glue between Transformers' Trainer and the Teleporter.

-trainer = Trainer(model, TrainingArguments("out"), train_dataset=rows)
+trainer = TeleportTrainer(model, TeleportTrainingArguments("out"), train_dataset=rows)
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from tqdm.auto import tqdm
from transformers import Trainer

from hf_teleport.arguments import TeleportArguments
from hf_teleport.config import TeleportConfig
from hf_teleport.event.batches import check_given, share_of
from hf_teleport.event.choice import BASIS_STEP, afford
from hf_teleport.event.cost import LARGE_SHARE, Cost, event_passes, share_of_run
from hf_teleport.journal import Journal, about, teleports
from hf_teleport.optimizers.parts import keeps_copies, unwrapped
from hf_teleport.report import TeleportReport, share
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.callback import TeleportCallback
from hf_teleport.training.card import add_to_card
from hf_teleport.training.schedule import teleport_steps, upcoming_rates
from hf_teleport.training.summary import console, table
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
        self._settled: TeleportConfig | None = None
        self.teleport_reports: list[TeleportReport] = []
        self._journal = Journal()
        self._teleport_steps: dict[int, int] = {}
        self._held: list[nn.Parameter] = []
        self._last_step_seen = -1
        self._rate_factor = 1.0
        self.add_callback(TeleportCallback(self))

    @property
    def teleport_dataset(self) -> Any:
        """The rows to draw teleport batches from."""
        return self.train_dataset if self._own_teleport_dataset is None else self._own_teleport_dataset

    @teleport_dataset.setter
    def teleport_dataset(self, rows: Any) -> None:
        self._own_teleport_dataset = rows

    @property
    def _settings(self) -> TeleportConfig:
        """Those in force: what method 'auto' has come to, or `teleport_config` itself."""
        return self._settled or self.teleport_config

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; an empty data set to teleport on is refused at once."""
        scheduled = self.teleport_config.epochs if self.teleport_config.steps is None else self.teleport_config.steps
        if scheduled and isinstance(self.teleport_dataset, Sized) and not len(self.teleport_dataset):
            raise ValueError(_EMPTY)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A training step; before the first micro-batch of a scheduled step, a teleport."""
        step = self.state.global_step
        if step != self._last_step_seen:
            self._last_step_seen = step
            if step in self._teleport_steps:
                self.teleport()
        return super().training_step(model, inputs, *args, **kwargs)

    def teleport(self) -> TeleportReport:
        """Teleport the model now, log what came of it, and return the report: that of the last method, if there are several."""
        step = self.state.global_step
        with preserved_rng():
            batches, held_back = self._teleport_batches(self._settings.num_batches, event=step)
        for config in self._settings.each_method():
            with self._teleport_bar(step) as progress, preserved_rng():
                teleporter = self._teleporter(config, progress)
                report = teleporter.teleport(batches, self._teleport_loss, held_back)
            self.teleport_reports.append(report)
            self._rate_factor = report.matched_rate
            if self.is_world_process_zero():
                run = about(teleporter.model, self.args, self.teleport_config, self._settled)
                self._journal.add(self.args.output_dir, step, self.state.epoch, report, run)
            should_log = self.control.should_log
            with unnoted(self):
                self.log({f"teleport/{name}": value for name, value in report.metrics().items()})
            self.control.should_log = should_log  # which a log clears: this one is not the one that was asked for
            if self.is_world_process_zero():
                self._tell(f"Teleport before step {step}: {report.summary()}")
        return report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with a section on the teleports of this run, those before it was resumed included."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir, "README.md"), self.teleport_config, teleports(self.state.log_history))

    def _teleporter(self, config: TeleportConfig, progress: Any = None) -> Teleporter:
        return Teleporter(
            self.model, config, progress, self.optimizer, self.args.max_grad_norm, upcoming_rates(self.lr_scheduler)
        )

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
        generator = torch.Generator().manual_seed(self.teleport_config.seed + event)
        streamed = isinstance(dataset, IterableDataset)
        return DataLoader(
            dataset,
            batch_size=self.teleport_config.batch_size or self._train_batch_size * self.args.world_size,
            sampler=None if streamed else RandomSampler(dataset, generator=generator),
            collate_fn=collator,
            generator=generator,
        )

    def _teleport_batches(self, count: int, event: int) -> tuple[list[Any], Any]:
        """This process's share of so many batches, and of one more to hold back: None if the data gives no more."""
        # Collators that draw random numbers (masked language modelling) draw the same for the same event.
        torch.manual_seed(self.teleport_config.seed + event)
        drawn = islice(self.get_teleport_dataloader(event), count + 1)
        rank, size = self.args.process_index, self.args.world_size
        batches = [share_of(batch, rank, size) for batch in drawn]
        return batches[:count], batches[count] if len(batches) > count else None

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

    def _tell(self, line: str) -> None:
        logger.info(line) if self.args.disable_tqdm else tqdm.write(line)

    def _sum_up(self) -> None:
        """Show a table of the run's teleports, those before it was resumed included, where bars are shown too."""
        if self._journal.events and not self.args.disable_tqdm and self.is_world_process_zero():
            console().print(table(self._journal.events))

    def _plan_teleports(self, train_dataloader: Any) -> None:
        """Make the schedule, and find out before the first step whether its teleports can work.

        Raises:
            ValueError: an impossible schedule, an empty data set, batches that are generated, a loss that cannot be teleported, a
                target module that matches nothing, no weight that may move, or an optimizer that a change of basis does not suit.
        """
        _, steps_per_epoch, *_, max_steps = self.set_initial_training_values(self.args, train_dataloader)
        self._settled = None
        self._journal.begin(self.args.output_dir, self.state.log_history)
        # Early, but an epoch or the whole run may be short.
        planned, basis_step = self.teleport_config, min(BASIS_STEP, steps_per_epoch // 2, max_steps // 2)
        if planned.method == "auto":  # if it comes to a change of basis, that is the step it waits for
            planned = replace(planned, warmup_steps=max(planned.warmup_steps, basis_step))
        self._teleport_steps = teleport_steps(planned, steps_per_epoch, max_steps)
        self._last_step_seen = -1
        self._held = []
        self._rate_factor = self._logged_rate_factor(steps_per_epoch)
        upcoming = [step for step in self._teleport_steps if step >= self.state.global_step]
        if not upcoming:
            return
        check_strategy(self.accelerator)
        check_given(type(self))
        with preserved_rng():
            batches, _ = self._teleport_batches(1, event=min(upcoming))
            if not batches:
                raise ValueError(_EMPTY)
            start = time.perf_counter()
            if self.teleport_config.method == "auto":
                self._settle(batches[0], steps_per_epoch, max_steps, basis_step)
                upcoming = [step for step in self._teleport_steps if step >= self.state.global_step]
            # Even if the run can't pay for a teleport: a wrong name or a loss that is none is said now, not in the next run.
            checks = [self._teleporter(config).check(batches[0], self._teleport_loss) for config in self._settings.each_method()]
            seconds = time.perf_counter() - start
        if not upcoming:
            return
        if self.teleport_config.method == "auto" and checks[0].immovable:
            self._teleport_steps = {}
            logger.warning("Method 'auto': no teleports, for %s.", checks[0].immovable)
            return
        if not self.state.global_step:  # a resumed run has begun, and its events would only warn
            for check in checks:
                check.require_movable()
        if self._settings.blocking_gains == "hold":
            self._held = [parameter for check in checks for parameter in check.blocking]
        if not self.is_world_process_zero():
            return
        if keeps_copies(self.optimizer):
            logger.warning(
                "%s seems to keep copies of the weights, which do not follow a teleport and draw the weights back. "
                "Use an optimizer that keeps none, such as AdamW.",
                type(unwrapped(self.optimizer)).__name__,
            )
        if problems := [check.problem for check in checks if check.problem]:
            logger.warning("Teleports will be skipped as long as this lasts: %s.", problems[0])
            return
        for config, check in zip(self._settings.each_method(), checks, strict=True):
            self._tell(
                f"Teleports ({config.method}) before steps {_shortened(sorted(upcoming))}: "
                f"{sum(layer.movable for layer in check.layers)} of {len(check.layers)} weights "
                f"({share(check.layers, lambda layer: layer.movable):.0%} of the elements) may move. "
                f"An event makes at most {event_passes(config)} passes over a teleport batch: it may take "
                f"{check.cost}. The check took {seconds:.2g} s."
            )
        self._warn_of_cost([check.cost for check in checks], len(upcoming))

    def _settle(self, batch: Any, steps_per_epoch: int, max_steps: int, basis_step: int) -> None:
        """Decide for method 'auto' on settings and schedule, by what is the same in a run and in its resumption."""
        teleporter = self._teleporter(self.teleport_config)
        chosen, why = teleporter.choose(batch, self._teleport_loss, basis_step)
        steps = teleport_steps(chosen, steps_per_epoch, max_steps)
        affordable = afford(chosen, len(steps), self._passes(max_steps))
        self._settled = affordable or chosen
        self._teleport_steps = {} if affordable is None else steps
        if why and self.is_world_process_zero():
            outcome = (
                f"'null_space' instead, kept if the next {chosen.rehearsal_steps} steps land lower with it."
                if affordable
                else f"no teleports, for even one takes more than {chosen.budget:.0%} of so short a run (teleport_budget)."
            )
            line = f"Method 'auto': no change of basis ({why}); {outcome}"
            self._tell(line) if affordable else logger.warning(line)

    def _passes(self, steps: int) -> float:
        """What so many training steps take, in passes over a teleport batch."""
        args = self.args
        samples = args.train_batch_size * args.world_size
        return steps * args.gradient_accumulation_steps * samples / (self._settings.batch_size or samples)

    def _logged_rate_factor(self, steps_per_epoch: int) -> float:
        """That of the last teleport of the epoch in which a run is resumed."""
        epoch = self.state.global_step // steps_per_epoch * steps_per_epoch
        logged = [row for row in self.state.log_history if row["step"] >= epoch and "teleport/loss_before" in row]
        return logged[-1].get("teleport/matched_rate", 1.0) if logged else 1.0

    def _warn_of_cost(self, costs: list[Cost], events: int) -> None:
        """Say so if teleports may take more than a small share of the run, whose own time is judged from a teleport batch."""
        passes = self._passes(self.state.max_steps - self.state.global_step)
        share_of_time = share_of_run(events * sum(cost.event_seconds for cost in costs), passes, costs[0].pass_seconds)
        if share_of_time > LARGE_SHARE:
            logger.warning(
                "Teleports may take up to %.0f %% of the time of training itself; with smaller num_batches, steps_per_batch or "
                "batch_size, or fewer events, they take less.",
                100 * share_of_time,
            )


def _shortened(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:6], "...", steps[-1]]))


class TeleportTrainer(TeleportMixin, Trainer):
    """`Trainer` that teleports before scheduled epochs. All of Trainer's arguments, and those of `TeleportMixin`."""
