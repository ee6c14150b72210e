"""Method 'auto': which method suits a model and its optimizer, and how much of it a run can pay for.

The measurements are in docs/when.md. A change of basis shortens training if the optimizer rescales each coordinate
alone and the model has features to turn. Nobody knows beforehand whether the null space helps, so each event must pass
a rehearsal.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_teleport.config import TeleportConfig
from hf_teleport.event.check import Check
from hf_teleport.event.cost import event_passes
from hf_teleport.optimizers.state import check_optimizer

# The first gradients say little about the basis. After ten steps they say nearly all that they ever will.
BASIS_STEP = 10

# How many optimizer steps are rehearsed before a null space event is kept.
_REHEARSED = 8


def choose(
    config: TeleportConfig, optimizer: Any, check: Callable[[TeleportConfig], Check], basis_step: int = BASIS_STEP
) -> tuple[TeleportConfig, str]:
    """Settings with method 'basis' if something turns, else with 'null_space', kept only if a rehearsal ends lower with
    it. Without an optimizer it is the paper's method.

    Args:
        config: the settings to start from.
        optimizer: the one that trains the model.
        check: what a teleport with other settings could do; `Teleporter.check` on a batch.
        basis_step: before which step a basis is turned at the earliest.

    Returns:
        The settings, and why not 'basis'; empty: it is.

    Raises:
        ValueError: as `check`.
    """
    if optimizer is None:
        return config.for_method("null_space"), "no optimizer is known"
    # With tied embeddings the residual stream turns only while the last norm's gain is even. Holding the gain costs
    # nothing.
    gains: Any = "hold" if config.blocking_gains == "leave" else config.blocking_gains
    warmup = max(config.warmup_steps, basis_step)
    basis = replace(config.for_method("basis"), warmup_steps=warmup, blocking_gains=gains)
    try:
        check_optimizer(optimizer, reset=config.optimizer_state == "reset")
    except ValueError as error:
        why = str(error).rstrip(".")
    else:
        found = check(basis)
        if any(not symmetry.reason for symmetry in found.symmetries):
            return basis, ""
        why = found.problem or "the model has no features to turn"
    rehearsed = config.rehearsal_steps or _REHEARSED
    # The user's own settings stay.
    unset = config.energy_threshold == 1 and config.scope == "joint" and config.step_size == "relative"
    tau = None if unset else config.energy_threshold
    objective: Any = "lookahead" if config.objective == "grad_norm" else config.objective
    chosen = replace(config.for_method("null_space"), objective=objective, energy_threshold=tau, rehearsal_steps=rehearsed)
    return chosen, why


def afford(config: TeleportConfig, budget: float | None, events: int, training_passes: float) -> TeleportConfig | None:
    """Settings with so few steps and batches that all events stay within a budget.

    The budget counts passes over a teleport batch and not seconds, so a run and its resumption choose the same. A
    change of basis is not cut, because with fewer batches it would know less.

    Args:
        config: as `choose` returns it.
        budget: share of the run that teleports may take; None: no limit.
        events: how many the run has.
        training_passes: what training takes, in passes over a teleport batch.

    Returns:
        None if not even the smallest event can be paid for.
    """
    if budget is None or config.method == "basis":
        return config
    steps, batches = config.steps_per_batch, config.num_batches
    while True:
        cut = replace(config, steps_per_batch=steps, num_batches=batches)
        if events * event_passes(cut) <= budget * training_passes:
            return cut
        # Cut steps before batches: a null space of more batches is safer for data outside them.
        if steps > 2:
            steps //= 2
        elif batches > 1:
            batches //= 2
        else:
            return None
