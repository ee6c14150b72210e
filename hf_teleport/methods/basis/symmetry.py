"""A symmetry of a model: blocks of features, each with the parameter axes that one orthogonal matrix turns."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from hf_teleport.methods.basis.features import Norm, effective, uniform

# Why a symmetry is left out that another batch may free.
UNUSED = "was not used on the teleport data"

# A gain that is folded is divided by.
SMALLEST_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Part:
    """Where a parameter's axis holds the features of a symmetry.

    Attributes:
        positions: indices along the axis, (H, r, k): for each of H blocks of k features its r copies (a group's query heads).
        reads: whether the axis is multiplied with the features, and not what writes them.
    """

    parameter: nn.Parameter
    dim: int
    positions: Tensor
    reads: bool


@dataclass(frozen=True, eq=False)
class Fold:
    """A gain to be divided out of its norm and multiplied into the axes that read the norm's output.

    Attributes:
        readers: each with the index of the gain's element for each position along its axis.
    """

    norm: Norm
    readers: list[tuple[nn.Parameter, int, Tensor]]

    def of(self, stand_in: Callable[[nn.Parameter], nn.Parameter]) -> "Fold":
        """The same fold of parameters that stand in for its own."""
        bias = self.norm.bias
        norm = replace(self.norm, gain=stand_in(self.norm.gain), bias=None if bias is None else stand_in(bias))
        return Fold(norm, [(stand_in(parameter), dim, elements) for parameter, dim, elements in self.readers])


def folds_of(symmetries: Iterable["Symmetry"]) -> list[Fold]:
    """The folds of symmetries, one for each gain. Several symmetries may have the same."""
    return list({fold.norm.gain: fold for symmetry in symmetries for fold in symmetry.folds}.values())


@dataclass(eq=False)
class Symmetry:
    """Blocks of features that may be turned, or that could be turned without the reason given.

    Attributes:
        kind: 'stream' (residual), 'value_output', 'query_key', 'chain' (a product of two weights: LoRA, a latent), or 'scaling'
            (single features that may only be scaled).
        name: of the weights that write it.
        blocks, size: number of blocks, one orthogonal matrix (size, size) for each.
        centred: whether the matrices must keep the vector of ones.
        parts: the axes to turn.
        gains: norm gains inside, all ones or uniform: the turn leaves them, but their moments lose their meaning.
        folds: the norms whose gains go into their readers first.
        rounded: gains that must be made uniform first, because they can be neither folded nor turned.
        reason: why it is left out. Empty: it is used.
    """

    kind: str
    name: str
    blocks: int
    size: int
    centred: bool = False
    parts: list[Part] = field(default_factory=list)
    gains: list[nn.Parameter] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    rounded: list[nn.Parameter] = field(default_factory=list)
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether nothing that training does to gains has ended what was found when they were others."""
        uneven = any(not uniform(gain) for gain in self.blocking)
        return not uneven and all(bool((effective(fold.norm).abs() >= SMALLEST_GAIN).all()) for fold in self.folds)

    @property
    def blocking(self) -> list[nn.Parameter]:
        """Gains that let the symmetry pass only because they are uniform, and would not let it if they were trained."""
        folded = {fold.norm.gain for fold in self.folds}
        return [gain for gain in self.gains if gain not in folded]

    def of(self, stand_in: Callable[[nn.Parameter], nn.Parameter]) -> "Symmetry":
        """The same symmetry of parameters that stand in for its own."""
        return replace(
            self,
            parts=[replace(part, parameter=stand_in(part.parameter)) for part in self.parts],
            gains=[stand_in(gain) for gain in self.gains],
            folds=[fold.of(stand_in) for fold in self.folds],
            rounded=[stand_in(gain) for gain in self.rounded],
        )

    def within(self, parameters: Container[nn.Parameter]) -> "Symmetry":
        """The part of a symmetry that concerns these parameters. It keeps all norms, because their gains are needed."""
        folds = [Fold(fold.norm, [reader for reader in fold.readers if reader[0] in parameters]) for fold in self.folds]
        return replace(self, parts=[part for part in self.parts if part.parameter in parameters], folds=folds)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What a turn changes, each once."""
        folded = [p for fold in self.folds for p in (fold.norm.gain, fold.norm.bias) if p is not None]
        readers = [reader for fold in self.folds for reader, _, _ in fold.readers]
        return list(dict.fromkeys([part.parameter for part in self.parts] + self.gains + folded + readers))
