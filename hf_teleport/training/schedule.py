"""The schedule: the optimizer steps before which to teleport.

It is a pure function of the settings and of the run's length. So whether an event is due depends only on the step, and a run that
is resumed from a checkpoint teleports at the same steps.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from hf_teleport.config import TeleportConfig, parse_epochs
from hf_teleport.event.choice import BASIS_STEP
from hf_teleport.settings.values import DOUBLING


def teleport_steps(config: TeleportConfig, steps_per_epoch: int, max_steps: int, prefix: str = "") -> dict[int, int]:
    """The optimizer steps before which to teleport, each with its epoch.

    Args:
        config: the settings `epochs`, `warmup_steps`, `steps` and `every_steps` are used.
        steps_per_epoch: optimizer steps in one epoch.
        max_steps: optimizer steps in the whole run.
        prefix: a prefix for names of settings in messages, if the user gave them as training arguments.

    Returns:
        `{step: epoch}`, both counted from 0. An event happens just before its step. Empty: never.

    Raises:
        ValueError: a listed epoch or step lies beyond the run, or the warm-up outlasts every scheduled epoch.
    """
    if config.steps == DOUBLING or _unscheduled_basis(config):
        steps = doubling(config.warmup_steps, steps_per_epoch, max_steps, prefix)
    elif config.steps is not None:
        steps = _listed(config.steps, max_steps, prefix)
    else:
        steps = _of_epochs(config, steps_per_epoch, max_steps, prefix)
    if steps and config.every_steps:
        steps = sorted({*steps, *range(steps[0], max_steps, config.every_steps)})
    return {step: step // steps_per_epoch for step in steps}


def _of_epochs(config: TeleportConfig, steps_per_epoch: int, max_steps: int, prefix: str) -> list[int]:
    """The first step of each scheduled epoch, or the first one after the warm-up."""
    num_epochs = -(-max_steps // steps_per_epoch)
    scheduled = parse_epochs(config.epochs)
    if isinstance(scheduled, int):
        if scheduled > num_epochs:
            warnings.warn(
                f"{prefix or 'teleport '}epochs = {scheduled} is more than the {num_epochs} epochs of the run, "
                "so each of them will begin with a teleport. If you do not want that, lower it.",
                stacklevel=3,
            )
        epochs = list(range(min(scheduled, num_epochs)))
    else:
        epochs = sorted(set(scheduled))
        beyond = [epoch for epoch in epochs if epoch >= num_epochs]
        if beyond:
            raise ValueError(
                f"teleport epochs {beyond} lie beyond the run, which has {num_epochs} epochs (0 to {num_epochs - 1}); "
                f"train for longer or remove them from `{prefix}epochs`."
            )
    firsts = [(epoch, max(epoch * steps_per_epoch, config.warmup_steps)) for epoch in epochs]
    steps = [step for epoch, step in firsts if step < min((epoch + 1) * steps_per_epoch, max_steps)]
    if epochs and not steps:
        raise ValueError(
            f"{prefix}warmup_steps = {config.warmup_steps} outlasts every scheduled epoch ({epochs}, {steps_per_epoch} steps "
            "each), so no teleport would happen; lower it or schedule later epochs."
        )
    return steps


def doubling(warmup_steps: int, steps_per_epoch: int, max_steps: int, prefix: str = "") -> list[int]:
    """Steps 10, 20, 40, ... up to half of the run. Gradients change fast at first and slowly later.

    Args:
        warmup_steps: the first step, if it is later than 10. If an epoch has fewer than 20 steps, the first event comes in its
            middle.
        steps_per_epoch: optimizer steps in one epoch.
        max_steps: optimizer steps in the whole run.
        prefix: a prefix for names of settings in messages.

    Raises:
        ValueError: the first step lies beyond the run.
    """
    first = max(warmup_steps, min(BASIS_STEP, steps_per_epoch // 2, max_steps // 2))
    if first >= max_steps:
        raise ValueError(
            f"{prefix}warmup_steps = {warmup_steps}: all teleports lie beyond the run, which has {max_steps} optimizer steps "
            f"(0 to {max_steps - 1}); lower it, or train for longer."
        )
    scheduled = [first]
    while 0 < 2 * scheduled[-1] <= max_steps // 2:
        scheduled.append(2 * scheduled[-1])
    return scheduled


def _unscheduled_basis(config: TeleportConfig) -> bool:
    """Whether the method is 'basis' and the user gave no schedule."""
    default = TeleportConfig()
    return config.method == "basis" and all(
        getattr(config, name) == getattr(default, name) for name in ("epochs", "steps", "every_steps")
    )


def _listed(steps: Any, max_steps: int, prefix: str) -> list[int]:
    if beyond := [step for step in steps if step >= max_steps]:
        raise ValueError(
            f"teleport steps {beyond} lie beyond the run, which has {max_steps} optimizer steps (0 to {max_steps - 1}); "
            f"train for longer or remove them from `{prefix}steps`."
        )
    return steps


def upcoming_rates(scheduler: Any) -> Callable[[int], list[float]] | None:
    """A function that gives the learning rate of each parameter group at the i-th step from now.

    None: the scheduler can't tell beforehand. All schedulers of Transformers can, except those that wait for a plateau.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate wraps the scheduler
    if not isinstance(scheduler, LambdaLR):
        return None
    now, pairs = scheduler.last_epoch, list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
    return lambda i: [float(base * factor(now + i)) for base, factor in pairs]
