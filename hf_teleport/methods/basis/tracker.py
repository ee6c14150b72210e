"""What a run knows of its bases between events: the symmetries, and second moments gathered from its training steps."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.layers.roles import names_of_parameters, parameters_by_name
from hf_teleport.methods.basis.averages import Average
from hf_teleport.methods.basis.moments import Moments, turned
from hf_teleport.methods.basis.symmetry import UNUSED, Symmetry
from hf_teleport.methods.basis.way import Leg, Way, is_of_way
from hf_teleport.weights.snapshot import Snapshot


class Tracker:
    """Reads the gradients of training steps, so that an event needs no teleport batches to choose a basis.

    Args:
        every: at which steps to look: those that it divides; 0: at none.
        decay: how much of the moments is left at the next look.

    Attributes:
        moments: of the symmetries that will be turned; None: they are not known yet.
        reasons: for each parameter that no symmetry turns, why.
        way: all turns since the run began.
        averages: of the weights, to be turned along.
    """

    def __init__(self, every: int = 5, decay: float = 0.8):
        self.every = every
        self.decay = decay
        self.way = Way()
        self.averages: list[Average] = []
        self.moments: Moments | None = None
        self.reasons: dict[nn.Parameter, str] = {}
        self._all: list[Symmetry] = []
        self._keys: dict[Symmetry, str] = {}
        self._immovable: frozenset[nn.Parameter] = frozenset()
        self._loaded: dict[str, Tensor] = {}

    def known(self, immovable: frozenset[nn.Parameter]) -> list[Symmetry]:
        """The symmetries that were found, with those that are left out. Empty: they must be looked for, or looked for again.

        Args:
            immovable: parameters that must stay; others than last time may free a symmetry, or stop one.
        """
        used = all(UNUSED not in symmetry.reason for symmetry in self._all)
        return self._all if used and immovable == self._immovable else []

    @property
    def seen(self) -> bool:
        """Whether a step was looked at."""
        return self.moments is not None and self.moments.looks > 0

    @property
    def values(self) -> dict[Symmetry, Tensor]:
        """The second moments, (H, k, k), of the symmetries that were looked at."""
        return {} if self.moments is None else self.moments.values

    def begin(self, symmetries: list[Symmetry], reasons: dict[nn.Parameter, str], immovable: frozenset[nn.Parameter]) -> None:
        """Set the symmetries of a model. Second moments of symmetries that it had before are kept."""
        known = self.state_dict()
        self._all, self.reasons, self._immovable = symmetries, reasons, immovable
        self._keys = {symmetry: key for key, symmetry in _keyed(symmetries).items()}
        # In the order of their keys, because all ranks must sum up their shards in the same order.
        self.moments = Moments((each for each in self._keys if not each.reason), self.decay)
        self._fill(known)

    def looks_at(self, step: int) -> bool:
        """Whether the gradients of this optimizer step are looked at."""
        return bool(self.every) and step % self.every == 0

    def look(self, step: int) -> None:
        """Before optimizer step `step`, the gradients being those that it will take."""
        if self.moments is not None and self.looks_at(step):
            parameters = {part.parameter for symmetry in self.moments.symmetries for part in symmetry.parts}
            self.moments.look({p: p.grad for p in parameters if p.grad is not None})

    def forget(self) -> None:
        """Look for the symmetries again: what was taken for one was none."""
        self._all = []

    def turned(self, moments: Mapping[Symmetry, Tensor]) -> None:
        """The model was turned, and these second moments with it."""
        if self.seen:
            self.values.update(moments)

    @contextmanager
    def undone_on_error(self, symmetries: Iterable[Symmetry]) -> Iterator[None]:
        """Inside, the way, the second moments and the averages may turn. If an error occurs, they are what they were.

        Args:
            symmetries: those that turn.
        """
        legs, gains, values = [replace(leg) for leg in self.way.legs], dict(self.way.gains), dict(self.values)
        own = [symmetry.of(average) for symmetry in symmetries for average in self.averages]
        averages = Snapshot(dict.fromkeys(parameter for symmetry in own for parameter in symmetry.parameters))
        try:
            yield
        except BaseException:
            self.way.legs, self.way.gains = legs, gains
            self.values.update(values)
            averages.restore()
            raise

    def moments_back(self, staying: Container[Leg]) -> dict[Symmetry, Tensor]:
        """The second moments in the coordinates after turning back all legs, except those that stay."""
        back = dict(self.values)
        for symmetry in back:
            for leg in reversed(self.way.of(symmetry)):
                if leg not in staying and symmetry.kind != "scaling":
                    back[symmetry] = turned(back[symmetry], leg.back)
        return back

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        if self.moments is None or not self.moments.looks:
            return self._loaded
        looked = {self._keys[symmetry]: value.contiguous() for symmetry, value in self.moments.values.items()}
        return {**looked, "looks": torch.tensor(self.moments.looks)}

    def saved(self, model: nn.Module) -> dict[str, Tensor]:
        """`state_dict`, and the way: all that a loop needs to go on from saved weights."""
        return {**self.way.state_dict(names_of_parameters(model)), **self.state_dict()}

    def load(self, saved: Mapping[str, Tensor], model: nn.Module) -> None:
        """Take in what `saved` returned; moments wait until the symmetries are known. Copies of frozen weights stay.

        Raises:
            ValueError: it is of another model.
        """
        frozen = self.way.frozen
        self.way = Way.from_state_dict(saved, parameters_by_name(model))
        self.way.frozen = frozen
        if moments := {name: tensor for name, tensor in saved.items() if not is_of_way(name)}:
            self._loaded = moments
            self._fill(moments)

    def _fill(self, state: Mapping[str, Any]) -> None:
        if self.moments is None or not state:
            return
        self.moments.looks = int(state["looks"])
        for symmetry in self.moments.symmetries:
            value = state.get(self._keys[symmetry])
            if value is not None and value.shape == (symmetry.blocks, symmetry.size, symmetry.size):
                self.moments.values[symmetry] = value.to(symmetry.parts[0].parameter.device)


def _keyed(symmetries: Iterable[Symmetry]) -> dict[str, Symmetry]:
    """Each symmetry by its name in a file, in an order that is the same in all processes.

    Parts of one weight that are read by different weights may have the same kind and size. All but the first get a number.
    """

    def order(symmetry: Symmetry) -> tuple[str, list[int]]:
        name = f"{symmetry.kind}/{symmetry.name}/{symmetry.blocks}x{symmetry.size}"
        return name, sorted(int(part.positions.min()) for part in symmetry.parts)

    keyed, counts = {}, Counter[str]()
    for symmetry in sorted(symmetries, key=order):
        name, _ = order(symmetry)
        counts[name] += 1
        keyed[name if counts[name] == 1 else f"{name}/{counts[name]}"] = symmetry
    return keyed
