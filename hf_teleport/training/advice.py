"""Advice for the log about settings that are not a teleport's."""

from typing import Any

from torch import nn

from hf_teleport.layers.roles import end_layer
from hf_teleport.optimizers.parts import parts


def larger_embedding_rate(model: nn.Module, optimizer: Any) -> str:
    """Advice to give a new language model's embeddings and output head a larger learning rate (docs/results.md).

    Returns:
        A line. Empty: the model has no such layers, or one of them has a larger rate than all other weights.
    """
    ends = [end_layer(model, "input"), end_layer(model, "output")]
    outer = {parameter for end in ends if end is not None for parameter in end.parameters()}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for group in (group for part in parts(optimizer) for group in part.param_groups):
        for parameter in group["params"]:
            rates[parameter in outer].append(float(group.get("initial_lr", group["lr"])))
    if None in ends or not all(rates.values()) or max(rates[True]) > max(rates[False]):
        return ""
    return (
        f"Embeddings and output head learn at the rate of the other weights, {max(rates[True]):g}. In a new language model 8 to "
        "32 times that rate for them gained more than teleports (docs/when.md)."
    )
