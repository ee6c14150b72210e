"""Measure loss and gradient on the teleport batches, before an event and after it."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_teleport.layers.point import Point, evaluate, loss_at
from hf_teleport.methods import Method


@dataclass
class Measurement:
    """Loss and gradient norm of each batch, and the norm of the mean gradient over all batches."""

    losses: list[float]
    grad_norms: list[float]
    grad_norm: float

    @property
    def loss(self) -> float:
        """The mean loss of all batches."""
        return sum(self.losses) / len(self.losses)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def measure(method: Method, batches: list[Any], see: Callable[[Point], None] | None = None) -> Measurement:
    """Evaluate each batch in turn, and pass each point to `see`. Stops after a batch whose loss or gradient is not finite."""
    losses, grad_norms = [], []
    total: list[Tensor | None] = []
    for i, batch in enumerate(batches):
        point = method.evaluate(batch, method.config.seed + i)
        losses.append(point.loss)
        grad_norms.append(point.grad_norm)
        method.ranks.together(partial(_add, total, point.gradients))
        if not point.finite:
            break
        if see is not None:
            see(point)
    return Measurement(losses, grad_norms, method.weights.norm(total) / len(losses))


def landing(method: Method, batches: list[Any], held_back: Any, forgotten: Collection[nn.Parameter] = ()) -> float | None:
    """Rehearse the optimizer's next `rehearsal_steps` steps on the teleport batches, and return the loss on the batch held back.

    Args:
        forgotten: parameters whose optimizer state will be reset.

    Returns:
        The loss. None: there is nothing to rehearse, no optimizer, or no batch held back.
    """
    rehearsal, config = method.rehearsal, method.config
    if not config.rehearsal_steps or rehearsal is None or held_back is None:
        return None
    parameters = [p for p in method.model.parameters() if p.requires_grad]

    def gradients(step: int) -> list[Tensor | None]:
        i = step % len(batches)
        seed = config.seed + i
        return evaluate(method.model, method.loss_fn, batches[i], seed=seed, follow=[], weights=method.weights).gradients

    with rehearsal.ahead(parameters, gradients, config.rehearsal_steps, forgotten):
        return loss_at(method.model, method.loss_fn, held_back, seed=config.seed, weights=method.weights)


def _add(total: list[Tensor | None], gradients: list[Tensor | None]) -> None:
    """Add gradients to a total, one parameter at a time, to save memory. None counts as zero."""
    total.extend([None] * (len(gradients) - len(total)))
    for i, gradient in enumerate(gradients):
        known = total[i]
        if gradient is not None:
            # Not in place: autograd may return one tensor as two gradients.
            total[i] = gradient.detach() if known is None else known + gradient.detach()
