"""The composed way of a run: for each symmetry the product of its turns, for each norm the gain that was folded away.

All turns since the run began make one orthogonal matrix a block, `Q = Q_n ... Q_1`. Its inverse brings the weights back into the
coordinates in which they came, whatever training has made of them since. A norm's gain h, as training has left it, goes into its
readers first, `W <- W diag(h)`, for it does not commute with Q. Once turned back, the norm gets the gain g again that was folded
away, and its readers are divided by it: `W <- W diag(1/g)`.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.averages import Average
from hf_teleport.methods.basis.features import Norm, effective, uniform
from hf_teleport.methods.basis.frozen import Frozen
from hf_teleport.methods.basis.symmetry import SMALLEST_GAIN, Fold, Part, Symmetry
from hf_teleport.methods.basis.turn import Turn, unfold
from hf_teleport.optimizers.state import OptimizerState
from hf_teleport.report import SymmetryReport
from hf_teleport.weights.whole import WHOLE, Copies, Weights

# What a symmetry is described by besides its parameters, and where all of it stands in a file.
_PLAIN = ("kind", "name", "blocks", "size", "centred")
_WAY = "way"


def is_of_way(name: str) -> bool:
    """Whether a tensor in a file belongs to a way."""
    return name.partition("/")[0] == _WAY


@dataclass(eq=False)
class Leg:
    """All turns of one symmetry.

    Attributes:
        matrices: their product (H, k, k) in float64; for kind 'scaling' the product of the factors, (H, 1, 1).
    """

    symmetry: Symmetry
    matrices: Tensor

    @property
    def back(self) -> Tensor:
        """The inverse of the matrices."""
        return 1 / self.matrices if self.symmetry.kind == "scaling" else self.matrices.mT

    def report(self, reason: str) -> SymmetryReport:
        """What was turned, and why it stays so; no reason: it does not."""
        own = self.symmetry
        return SymmetryReport(own.kind, own.name, own.blocks, own.size, len(own.parameters), reason=reason)


class Way:
    """How the weights came from the coordinates in which a run began to those in which they are now.

    Attributes:
        legs: in order; only legs that share features need to be undone in the reverse order.
        gains: for each gain that was folded its fold, and what the norm multiplied with before the first one, (d,) in float64.
        frozen: what was loaded, of frozen weights that were turned in memory.
    """

    def __init__(self) -> None:
        self.legs: list[Leg] = []
        self.gains: dict[nn.Parameter, tuple[Fold, Tensor]] = {}
        self.frozen = Frozen()

    def __bool__(self) -> bool:
        return bool(self.legs)

    def add(self, turn: Turn, own: Callable[[Symmetry], Symmetry] = lambda symmetry: symmetry) -> None:
        """A turn was carried out.

        Args:
            own: for each symmetry of the turn the one of the stored parameters, if others stood in for them.
        """
        before = {fold.norm.gain: gain for fold, gain in turn.gains.items()}
        for symmetry, matrices in turn.rotations.items():
            for fold, stored in zip(symmetry.folds, own(symmetry).folds, strict=True):
                self.gains.setdefault(stored.norm.gain, (stored, before[fold.norm.gain].double()))
            self._extend(own(symmetry), matrices.double())

    def _extend(self, symmetry: Symmetry, matrices: Tensor) -> None:
        for leg in reversed(self.legs):
            if _key(leg.symmetry) == _key(symmetry):
                leg.matrices = matrices.to(leg.matrices.device) @ leg.matrices
                return
            if _overlap(leg.symmetry, symmetry):
                break
        self.legs.append(Leg(symmetry, matrices.clone()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What was turned, each once."""
        return list(dict.fromkeys(parameter for leg in self.legs for parameter in leg.symmetry.parameters))

    def staying(
        self,
        names: Mapping[nn.Parameter, str],
        objection: Callable[[nn.Parameter], str] = lambda parameter: "",
        averages: Iterable[Average] = (),
        weights: Weights = WHOLE,
    ) -> dict[Leg, str]:
        """The legs that can't be undone now, each with the reason.

        Args:
            names: of the parameters.
            objection: why what an optimizer keeps for a parameter can't be turned; empty: it can be.
            averages: which turn along.
            weights: have the stand-ins to look at; `names` and `objection` take these.
        """
        averages = list(averages)
        reasons: dict[Leg, str] = {}
        for leg in reversed(self.legs):
            later = next((other for other in reasons if _overlap(other.symmetry, leg.symmetry)), None)
            symmetry = leg.symmetry.of(weights.stand_in)
            with weights.reading(_gains(symmetry)):
                why = reasons[later] if later else _blocked(symmetry, names)
            why = why or next(filter(None, map(objection, symmetry.parameters)), "")
            why = why or next(filter(None, (average.objection(leg.symmetry) for average in averages)), "")
            if why:
                reasons[leg] = why
        return reasons

    @torch.no_grad()
    def turn_back(
        self,
        staying: Iterable[Leg] = (),
        state: OptimizerState | None = None,
        stand_in: Callable[[nn.Parameter], nn.Parameter] | None = None,
        only: Container[nn.Parameter] | None = None,
        weights: Weights = WHOLE,
    ) -> None:
        """Undo all legs but those that stay, in the parameters of the model or in an average of them.

        Args:
            staying: which stay; `forget` the others when all is turned.
            state: what an optimizer keeps, turned along. Averages of squares turn by the squared matrices: in the coordinates
                that they leave, the gradient's are nearly uncorrelated.
            stand_in: the parameter to turn in place of one; default: as `weights` says.
            only: turn these and no others; `stand_in` gives copies of norms that are not among them.
            weights: those that are turned. A sharded one is whole only if its rows are mixed, and only meanwhile.
        """
        staying, stand_in = list(staying), stand_in or weights.stand_in
        going = [leg for leg in self.legs if leg not in staying]
        for leg in reversed(going):
            symmetry = leg.symmetry if only is None else leg.symmetry.within(only)
            symmetry = symmetry.of(stand_in)
            with weights.reading(_gains(symmetry)):
                turn = Turn({symmetry: leg.back})
            turn.carry_out(state, weights)
        for gain in self._unfolded(staying):
            fold, before = self.gains[gain]
            if only is not None:
                fold = Fold(fold.norm, [reader for reader in fold.readers if reader[0] in only])
            unfold(fold.of(stand_in), before.to(stand_in(gain).device), state, weights)

    def move(self, average: Average, to: "Way") -> str:
        """Bring an average from the coordinates to which this way leads to those of another way of the same model.

        Returns:
            Why it can't be brought there; empty: it was.
        """
        same = len(self.legs) == len(to.legs) and all(
            _key(ours.symmetry) == _key(other.symmetry) and torch.equal(ours.matrices, other.matrices)
            for ours, other in zip(self.legs, to.legs, strict=True)
        )
        if same:
            return ""
        if why := next(filter(None, (average.objection(leg.symmetry) for leg in [*self.legs, *to.legs])), ""):
            return why
        self.turn_back(stand_in=average)
        for leg in to.legs:
            Turn({leg.symmetry.of(average): leg.matrices}).carry_out()
        return ""

    @torch.no_grad()
    def turned_frozen(self) -> dict[nn.Parameter, Tensor]:
        """Frozen weights in the coordinates to which the way leads, from what was loaded; in float32 at least."""
        originals = self.frozen.originals
        made = {
            p: nn.Parameter(original.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True), False)
            for p, original in originals.items()
        }
        stand_in = Copies(made)
        for leg in self.legs:
            Turn({leg.symmetry.within(originals).of(stand_in): leg.matrices}).carry_out()
        return {parameter: own.detach() for parameter, own in made.items()}

    @contextmanager
    def trained_at_home(self, saved: Container[nn.Parameter] = ()) -> Iterator[None]:
        """Inside, trained weights are where the frozen ones were loaded; afterwards they are bit for bit what they were.

        Args:
            saved: frozen weights that are what was loaded inside.
        """
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        frozen = {parameter: values for parameter, values in self.frozen.originals.items() if parameter in saved}
        kept = {parameter: parameter.detach().clone() for parameter in [*trained, *frozen]}
        try:
            self.turn_back((), None, Copies({parameter: parameter for parameter in trained}), set(trained))
            _put(frozen)
            yield
        finally:
            _put(kept)

    def forget(self, staying: Iterable[Leg] = ()) -> None:
        """All is turned back; what is left of the way are the legs that stay, and frozen weights that they turn."""
        staying = list(staying)
        still = {parameter for leg in staying for parameter in leg.symmetry.parameters}
        self.frozen.restore([parameter for parameter in self.frozen.originals if parameter not in still])
        for gain in self._unfolded(staying):
            del self.gains[gain]
        self.legs = [leg for leg in self.legs if leg in staying]
        if not self.legs:
            self.frozen.restore()

    def _unfolded(self, staying: list[Leg]) -> list[nn.Parameter]:
        """The gains that come back."""
        kept = {fold.norm.gain for leg in staying for fold in leg.symmetry.folds}
        return [gain for gain in self.gains if gain not in kept]

    def of(self, symmetry: Symmetry) -> list[Leg]:
        """The legs of the same features, whenever they were found, in order."""
        return [leg for leg in self.legs if _key(leg.symmetry) == _key(symmetry)]

    def within(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether all that was turned is among these parameters."""
        return set(self.parameters) <= set(parameters)

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """All that it takes to turn back without a forward: matrices, gains, and which axes of which parameters they belong to.

        Args:
            names: of the parameters.
        """
        if not self.legs:
            return {}
        state: dict[str, Tensor] = {}
        legs, folds = [], []
        for i, leg in enumerate(self.legs):
            symmetry = leg.symmetry
            state[f"{_WAY}/{i}/matrices"] = leg.matrices.contiguous()
            state |= {f"{_WAY}/{i}/part/{j}": part.positions.int().contiguous() for j, part in enumerate(symmetry.parts)}
            own = {name: getattr(symmetry, name) for name in _PLAIN}
            parts = [[names[part.parameter], part.dim, part.reads] for part in symmetry.parts]
            gains = [[names[gain] for gain in some] for some in (symmetry.gains, [f.norm.gain for f in symmetry.folds])]
            legs.append({**own, "parts": parts, "gains": gains[0], "folds": gains[1]})
        for i, (fold, gain) in enumerate(self.gains.values()):
            norm = fold.norm
            state[f"{_WAY}/gain/{i}"] = gain.contiguous()
            state |= {f"{_WAY}/gain/{i}/reader/{j}": elements.int() for j, (_, _, elements) in enumerate(fold.readers)}
            bias = None if norm.bias is None else names[norm.bias]
            readers = [[names[parameter], dim] for parameter, dim, _ in fold.readers]
            folds.append({"gain": names[norm.gain], "bias": bias, "offset": norm.offset, "readers": readers})
        text = json.dumps({"legs": legs, "gains": folds})
        return {**state, _WAY: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> "Way":
        """What `state_dict` has written, for a model with these parameters by their names.

        Raises:
            ValueError: it is of another model.
        """
        way = cls()
        if _WAY not in state:
            return way
        written = json.loads(bytes(state[_WAY].tolist()))
        other = "the turns were made in another model: {}. Give the model that was trained."

        def named(name: str) -> nn.Parameter:
            if name not in parameters:
                raise ValueError(other.format(f"this one has no parameter {name}"))
            return parameters[name]

        def axis(name: str, dim: int, positions: Tensor) -> tuple[nn.Parameter, int, Tensor]:
            shape = list(named(name).shape)
            if dim >= len(shape) or int(positions.max()) >= shape[dim]:
                raise ValueError(other.format(f"{name} has the shape {shape} here"))
            return named(name), dim, positions.long()

        folds: dict[str, Fold] = {}
        for i, own in enumerate(written["gains"]):
            gain, bias = named(own["gain"]), own["bias"]
            nothing = torch.empty(0, dtype=torch.long)  # features have numbers only while a forward is followed
            norm = Norm(gain, None if bias is None else named(bias), own["offset"], nothing, nothing)
            readers = [axis(name, dim, state[f"{_WAY}/gain/{i}/reader/{j}"]) for j, (name, dim) in enumerate(own["readers"])]
            folds[own["gain"]] = Fold(norm, readers)
            way.gains[gain] = folds[own["gain"]], state[f"{_WAY}/gain/{i}"].to(gain.device)
        for i, own in enumerate(written["legs"]):
            parts = [
                Part(*axis(name, dim, state[f"{_WAY}/{i}/part/{j}"]), reads) for j, (name, dim, reads) in enumerate(own["parts"])
            ]
            symmetry = Symmetry(**{name: own[name] for name in _PLAIN}, parts=parts)
            symmetry.gains = [named(name) for name in own["gains"]]
            symmetry.folds = [folds[name] for name in own["folds"]]
            way.legs.append(Leg(symmetry, state[f"{_WAY}/{i}/matrices"].to(parts[0].parameter.device)))
        return way


@torch.no_grad()
def _put(values: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, own in values.items():
        parameter.copy_(own)


def _key(symmetry: Symmetry) -> tuple[Any, ...]:
    """Equal for the same blocks of features of the same weights, whenever they were found."""
    where = frozenset((part.parameter, part.dim, part.positions.int().numpy().tobytes()) for part in symmetry.parts)
    return symmetry.kind, symmetry.blocks, symmetry.size, where


def _overlap(one: Symmetry, other: Symmetry) -> bool:
    """Whether some feature belongs to both."""
    return any(
        a.parameter is b.parameter and a.dim == b.dim and bool(torch.isin(a.positions, b.positions).any())
        for a in one.parts
        for b in other.parts
    )


def _gains(symmetry: Symmetry) -> list[nn.Parameter]:
    """The gains that decide whether and how a symmetry turns."""
    return [*symmetry.blocking, *(fold.norm.gain for fold in symmetry.folds)]


def _blocked(symmetry: Symmetry, names: Mapping[nn.Parameter, str]) -> str:
    """Why a symmetry can't be turned with the gains that its norms have now; empty: it can."""
    for gain in symmetry.blocking:
        if not uniform(gain):
            return f"training has made {names[gain]} uneven since it was turned, and it cannot be folded"
    for fold in symmetry.folds:
        # Without a bias a gain is only multiplied with.
        if fold.norm.bias is not None and bool((effective(fold.norm).abs() < SMALLEST_GAIN).any()):
            return f"training has brought {names[fold.norm.gain]} near zero since it was turned, and it cannot be folded"
    return ""
