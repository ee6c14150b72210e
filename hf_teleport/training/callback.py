"""Trainer callbacks that make the plan of a run, and carry it out between steps."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hf_teleport.training.plan import Plan
from hf_teleport.training.summary import console, table

logger = logging.getLogger(__name__)


class TeleportCallback(TrainerCallback):
    """Makes the plan of a run just before its first step, and carries it out between steps.

    Args:
        plan: a plan without a run, for calls of `teleport()` before the first run.
        make: makes the plan of a run from its training batches.

    Attributes:
        plan: the plan of the current run, or of the last one.
    """

    def __init__(self, plan: Plan, make: Callable[[Any], Plan]):
        self.plan = plan
        self._make = make

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.plan = self._make(train_dataloader)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.plan.missed(state.global_step):
            self.plan.steps = {}
            logger.warning(
                "No teleports: the trainer's training_step does not call TeleportMixin's, with which they come. Call "
                "super().training_step in it, or name TeleportMixin first among the bases of its class."
            )
        self.plan.look(state.global_step)
        _scale_rates(optimizer, self.plan.rate_factor)
        for parameter in self.plan.holds(state.global_step):
            parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        _scale_rates(optimizer, 1 / self.plan.rate_factor)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.plan.rate_factor = 1.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print a table of all teleports, also those from before the run was resumed. Without progress bars print nothing."""
        events = self.plan.journal.events
        if events and not args.disable_tqdm and state.is_world_process_zero:
            console().print(table(events))


class HomeCallback(TrainerCallback):
    """Turns the model back at the end of training, before other callbacks see, log or upload it.

    Args:
        turn_back: turns the model back, if the settings ask for it.
    """

    def __init__(self, turn_back: Callable[[], None]):
        self._turn_back = turn_back

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turn_back()


def _scale_rates(optimizer: Any, factor: float) -> None:
    if factor != 1:
        for group in optimizer.param_groups:
            group["lr"] *= factor
