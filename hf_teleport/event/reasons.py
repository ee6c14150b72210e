"""Why an event moved nothing, or a weight stayed, and what to do about it."""

from collections import Counter

from torch import nn

from hf_teleport.report import LayerReport, TeleportReport, why_immovable

NO_STEP = {
    "no_direction": "no layer has a direction; a model of one layer has none, and fresh LoRA (B = 0) has none yet: "
    "teleport it later",
    "non_finite": "the loss or its gradient is not finite on the teleport data; check that its rows have labels that are "
    "not all -100, and that training itself has not diverged",
    "max_loss_change": "every step changed the loss by more than max_loss_change; lower the teleport learning_rate, or raise it",
    "grad_norm_cap": "the gradient norm is above grad_norm_cap already; raise it to go further",
    "not_a_symmetry": "the gradients did not turn with the weights, so the turn was no symmetry; please report this model",
    "max_growth": "every step overshot max_growth; lower the teleport learning_rate",
    "no_gain": "no step raised the objective, so there is nothing to do; a smaller learning_rate tries shorter steps",
    "no_better": "after it the optimizer's next steps would have ended no lower, so it was undone, and there is nothing to do; "
    "rehearsal_steps = 0 keeps such teleports too",
    "held_back": "it changed the loss on the batch held back by more than max_loss_change; take more teleport batches",
    "out_of_memory": "memory ran out, with smaller batches too; lower batch_size, or teleport fewer layers by target_modules",
}


def explain(
    reports: dict[nn.Parameter, LayerReport],
    changed: dict[nn.Parameter, float | None],
    steps: int,
    reason: str,
    at_rest: str,
) -> None:
    """Note in each report whether its weight moved and how far, or why it stayed.

    Args:
        changed: the result of `Snapshot.changed`. Empty: nothing moved.
        at_rest: the reason for a movable weight that stayed although the event made a step.
    """
    for parameter, report in reports.items():
        report.moved, report.moved_by = parameter in changed, changed.get(parameter, 0.0)
        if report.moved:
            report.reason = ""
        elif not report.reason:
            report.reason = at_rest if steps else f"no step was kept ({reason})"


def why_unmoved(report: TeleportReport) -> str:
    """Why an event changed nothing."""
    reason = report.stopped_because
    if reason == "nothing_movable":
        return why_immovable(report.layers)
    spanned = Counter(layer.reason for layer in report.layers if layer.movable and layer.null_dim == 0)
    if reason == "no_direction" and spanned:
        free = any(layer.movable and layer.null_dim for layer in report.layers)
        return spanned.most_common(1)[0][0] + (f"; for the other layers: {NO_STEP[reason]}" if free else "")
    return NO_STEP.get(reason, reason)
