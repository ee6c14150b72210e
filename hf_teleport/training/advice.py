"""Advice for the log about settings that are not a teleport's."""

from typing import Any

from torch import nn
from torch.optim import Adam

from hf_teleport.layers.roles import end_layer
from hf_teleport.optimizers.parts import parts


def larger_embedding_rate(model: nn.Module, optimizer: Any) -> str:
    """Advice to give a new language model's embeddings and output head a larger learning rate (docs/results.md).

    Returns:
        A line. Empty: the model has no such layers, or one of them has a larger rate than all other weights. Also empty for
        optimizers other than Adam and AdamW, with which this was measured.
    """
    ends = [end_layer(model, "input"), end_layer(model, "output")]
    outer = {parameter for end in ends if end is not None for parameter in end.parameters()}
    rates: dict[bool, list[float]] = {True: [], False: []}
    steppers = parts(optimizer)
    for group in (group for stepper in steppers for group in stepper.param_groups):
        for parameter in group["params"]:
            rates[parameter in outer].append(float(group.get("initial_lr", group["lr"])))
    measured = all(isinstance(stepper, Adam) for stepper in steppers)
    if None in ends or not measured or not all(rates.values()) or max(rates[True]) > max(rates[False]):
        return ""
    return (
        f"Embeddings and output head have a learning rate of {max(rates[True]):g}, the other weights {max(rates[False]):g}. In "
        "small new language models 8 to 32 times the rate of the other weights gained more than teleports (docs/when.md)."
    )
