"""Copies of weights and of their optimizer state, to restore them."""

import math
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.weights.copies import copied, put
from hf_teleport.weights.whole import WHOLE, Weights


class Snapshot:
    """A copy of parameters, and of their optimizer state, to restore them.

    Args:
        state: the optimizer's `state`, if it is to be restored too.

    Attributes:
        kept: a copy of each parameter's optimizer state.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], state: MutableMapping[Any, Any] | None = None):
        self._saved = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._state = state
        self.kept = {} if state is None else {p: copied(state[p]) for p, _ in self._saved if p in state}

    def restore(self) -> None:
        """Put the copied values back, bit for bit."""
        with torch.no_grad():
            for parameter, saved in self._saved:
                parameter.copy_(saved)
        for parameter, kept in self.kept.items():
            # Use no new memory, because the reason for this call may be that memory ran out.
            now = self._state.setdefault(parameter, {})  # type: ignore[union-attr]
            for name, value in kept.items():
                if not put(now.get(name), value):
                    now[name] = value

    def halve(self) -> None:
        """Move the parameters half the way back."""
        with torch.no_grad():
            for parameter, saved in self._saved:
                parameter.lerp_(saved, 0.5)

    def moved(self) -> dict[nn.Parameter, Tensor]:
        """The difference of each parameter from its copy."""
        return {parameter: parameter.detach() - saved for parameter, saved in self._saved}

    def changed(self, weights: Weights = WHOLE) -> dict[nn.Parameter, float | None]:
        """The parameters W that differ from their copy W0, with ||W - W0|| / ||W0||. None: that is not finite.

        They are compared one at a time, to save memory.

        Args:
            weights: the weights that the parameters belong to.
        """
        found = weights.ranks.together(lambda: [_difference(parameter, saved) for parameter, saved in self._saved])
        lengths = iter(weights.joined([length for each in found for length in each]))
        return {
            parameter: _share(distance, length)
            for (parameter, _), differs, distance, length in zip(self._saved, lengths, lengths, lengths, strict=True)
            if differs
        }


@torch.no_grad()
def _difference(parameter: Tensor, saved: Tensor) -> tuple[float, float, float]:
    """Whether the two differ, the norm of the difference, and the norm of the copy. Other processes' parts may need the last."""
    differs = not torch.equal(parameter, saved)
    distance = float(torch.linalg.vector_norm(parameter - saved)) if differs else 0.0
    return float(differs), distance, float(torch.linalg.vector_norm(saved))


def _share(distance: float, length: float) -> float | None:
    relative = distance / length if length else math.inf
    return relative if math.isfinite(relative) else None
