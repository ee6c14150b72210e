"""What a run knows of its bases between events: the symmetries, and second moments gathered from its training steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.moments import Moments
from hf_teleport.methods.basis.symmetries import UNUSED, Symmetry

# How much of the moments is left at the next look. With a look at every fifth step, most of the weight lies on the last 25 steps.
_DECAY = 0.8


class Tracker:
    """Looks at the gradients of training steps, so that an event needs no batches of its own to choose a basis.

    Args:
        every: how many optimizer steps lie between two looks.

    Attributes:
        moments: of the symmetries that will be turned; None: they are not known yet.
        reasons: for each parameter that no symmetry turns, why.
    """

    def __init__(self, every: int = 5):
        self.every = every
        self.moments: Moments | None = None
        self.reasons: dict[nn.Parameter, str] = {}
        self._all: list[Symmetry] = []
        self._loaded: dict[str, Tensor] = {}

    @property
    def symmetries(self) -> list[Symmetry]:
        """Those that were found, with those that are left out. Empty: they must be looked for, or looked for again."""
        return [] if any(UNUSED in symmetry.reason for symmetry in self._all) else self._all

    @property
    def seen(self) -> bool:
        """Whether a step was looked at."""
        return self.moments is not None and self.moments.looks > 0

    def begin(self, symmetries: list[Symmetry], reasons: dict[nn.Parameter, str]) -> None:
        """Take in the symmetries of a model. What was gathered for those that are the same is kept."""
        known = self.state_dict() if self.moments is not None else self._loaded
        self._all, self.reasons = symmetries, reasons
        self.moments = Moments([symmetry for symmetry in symmetries if not symmetry.reason], _DECAY)
        self._fill(known)

    def look(self, step: int) -> None:
        """Before optimizer step `step`, the gradients being those that it will take."""
        if self.moments is not None and step % self.every == 0:
            parameters = {part.parameter for symmetry in self.moments.symmetries for part in symmetry.parts}
            self.moments.look({p: p.grad for p in parameters if p.grad is not None})

    def forget(self) -> None:
        """What was taken for a symmetry was none: look for them again at the next event."""
        self._all = []

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        if self.moments is None:
            return self._loaded
        looked = {_name(symmetry): value.contiguous() for symmetry, value in self.moments.values.items()}
        return {**looked, "looks": torch.tensor(self.moments.looks)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `state_dict` returned; it waits for the symmetries if they are not known yet."""
        self._loaded = dict(state)
        if self.moments is not None:
            self._fill(self._loaded)

    def _fill(self, state: Mapping[str, Any]) -> None:
        if self.moments is None or not state:
            return
        self.moments.looks = int(state["looks"])
        for symmetry in self.moments.symmetries:
            value = state.get(_name(symmetry))
            if value is not None and value.shape == (symmetry.blocks, symmetry.size, symmetry.size):
                self.moments.values[symmetry] = value.to(symmetry.parts[0].parameter.device)


def _name(symmetry: Symmetry) -> str:
    return f"{symmetry.kind}/{symmetry.name}/{symmetry.blocks}x{symmetry.size}"
