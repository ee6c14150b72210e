"""What a teleporting trainer does between steps: plan, weights held until the first event, matched rates, summary."""

from typing import Any

from transformers import TrainerCallback


class TeleportCallback(TrainerCallback):
    """Checks the teleports when everything is set up and nothing has been trained, and holds what must wait for the first."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self._trainer._plan_teleports(train_dataloader)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._scale_rates(self._trainer._rate_factor)
        if self._trainer._held and state.global_step < min(self._trainer._teleport_steps):
            for parameter in self._trainer._held:
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._scale_rates(1 / self._trainer._rate_factor)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._rate_factor = 1.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._sum_up()

    def _scale_rates(self, factor: float) -> None:
        if factor != 1:
            for group in self._trainer.optimizer.param_groups:
                group["lr"] *= factor
