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

# The very first gradients say little about the basis. After ten steps, waiting longer hardly improves the choice.
BASIS_STEP = 10

# How many optimizer steps are rehearsed before a null space event is kept.
_REHEARSED = 8


def choose(
    config: TeleportConfig, optimizer: Any, check: Callable[[TeleportConfig], Check], basis_step: int = BASIS_STEP
) -> tuple[TeleportConfig, str]:
    """Choose method 'basis' if the model has something to turn, else 'null_space' with a rehearsal.

    An event of 'null_space' is then kept only if the rehearsal ends lower with it. Without an optimizer the choice is the
    paper's method, without a rehearsal.

    Args:
        config: the settings to start from.
        optimizer: the optimizer that trains the model.
        check: tells what a teleport with other settings could do: `Teleporter.check` on a batch.
        basis_step: the earliest step before which a basis is turned.

    Returns:
        The settings, and the reason against 'basis'. An empty reason: 'basis' was chosen.

    Raises:
        ValueError: as `check`.
    """
    if optimizer is None:
        return config.for_method("null_space"), "no optimizer is known"
    # With tied embeddings the residual stream turns only while the last norm's gain is uniform. Holding the gain costs nothing.
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
    # Settings that the user has changed stay as they are.
    unset = config.energy_threshold == 1 and config.scope == "joint" and config.step_size == "relative"
    tau = None if unset else config.energy_threshold
    objective: Any = "lookahead" if config.objective == "grad_norm" else config.objective
    chosen = replace(config.for_method("null_space"), objective=objective, energy_threshold=tau, rehearsal_steps=rehearsed)
    return chosen, why


def afford(config: TeleportConfig, budget: float | None, events: int, training_passes: float) -> TeleportConfig | None:
    """Reduce steps and batches until all events stay within a budget.

    The budget counts passes over a teleport batch and not seconds, so a resumed run makes the same choice. A change of basis is
    not reduced, because fewer batches would tell it too little.

    Args:
        config: the settings, as `choose` returns them.
        budget: share of the run that teleports may take. None: no limit.
        events: number of events in the run.
        training_passes: length of the training, in passes over a teleport batch.

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
