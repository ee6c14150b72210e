"""Which features of a model may be turned together: facts noted in a forward, and what follows from all of them.

A *feature* is one index of one parameter's axis, or of an activation that it writes: an embedding's column, a projection's output
channel. Each has a number. A forward notes facts about features (`Facts`), and `solve` draws the conclusions:

- `same`: two features are one and the same coordinate, for their values are added or one is multiplied with the other's weights;
- `together`: features that an operation takes at once; only those with equal keys may be mixed, and none with one outside;
- `fixed`: an operation that no rotation passes through;
- `centred`: a layer norm subtracts the mean over them, so a rotation must keep the vector of ones.

What remains are blocks of features that one orthogonal matrix may turn without changing what the model computes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from hf_teleport.weights.shards import whole_of

NONE = -1
"""The number of no feature: a value that is zero, and stays zero under every rotation."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a parameter and the numbers of its features."""

    parameter: nn.Parameter
    dim: int
    first: int

    @property
    def size(self) -> int:
        """How many features there are."""
        return whole_of(self.parameter).shape[self.dim]

    @property
    def features(self) -> Tensor:
        """Numbers (size,)."""
        return torch.arange(self.first, self.first + self.size)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over features: `y = gain * x / rms(x) + bias`, the gain being `offset + weight`; centred for a layer norm.

    Attributes:
        inputs: features that were normalised, (d,).
        outputs: features of its output, (d,), which are the gain's features.
    """

    gain: nn.Parameter
    bias: nn.Parameter | None
    offset: float
    inputs: Tensor
    outputs: Tensor


def effective(norm: Norm) -> Tensor:
    """What the norm multiplies with: its weight, or one more than it."""
    return norm.gain.detach() + norm.offset


def uniform(gain: Tensor) -> bool:
    """Whether all elements are equal, to rounding."""
    gain = gain.detach()
    return bool((gain - gain.mean()).abs().max() <= 4 * torch.finfo(gain.dtype).eps * gain.abs().max().clamp_min(1.0))


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that may be gains, by their shape alone: the same ones in all processes."""
    shapes = {parameter: whole_of(parameter).shape for parameter in model.parameters()}
    return [parameter for parameter, shape in shapes.items() if shape.numel() == max(shape, default=1)]


@dataclass
class Facts:
    """What a forward showed about features. `mark` and `forget_since` take back what was noted in between.

    `factors` are parameters that scale features one by one and stop a rotation unless they are uniform: a layer scale, the gain
    of a norm over each head.
    """

    axes: dict[tuple[nn.Parameter, int], Axis] = field(default_factory=dict)
    count: int = 0
    same: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    together: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    split: list[tuple[Tensor, str]] = field(default_factory=list)
    flags: list[tuple[Tensor, str]] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    factors: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    reads: set[tuple[nn.Parameter, int]] = field(default_factory=set)
    writes: set[tuple[nn.Parameter, int]] = field(default_factory=set)

    def axis(self, parameter: nn.Parameter, dim: int) -> Axis:
        """The axis of a parameter, its features numbered when it is first asked for."""
        key = (parameter, dim % parameter.dim())
        if key not in self.axes:
            self.axes[key] = Axis(parameter, key[1], self.count)
            self.count += self.axes[key].size
        return self.axes[key]

    def note_same(self, a: Tensor, b: Tensor) -> None:
        """Two broadcastable tensors of features are equal, element by element."""
        a, b = torch.broadcast_tensors(compact(a), compact(b))
        both = (a != NONE) & (b != NONE)
        self.same.append((a[both], b[both]))

    def note_together(self, features: Tensor, keyed: tuple[int, ...] = (), split: str = "") -> None:
        """An operation takes these features at once, those at different indices of the `keyed` dims not alike.

        Args:
            split: the reason to give where this leaves single features.
        """
        features = compact(features)
        keys = torch.zeros_like(features)
        for dim in keyed:
            size = features.shape[dim]
            shape = [1] * features.dim()
            shape[dim] = size
            keys = keys * size + torch.arange(size).reshape(shape)
        real = features != NONE
        self.together.append((features[real], keys[real]))
        if split:
            self.split.append((features[real], split))

    def note_fixed(self, features: Tensor, reason: str) -> None:
        """These features pass through something that no rotation passes through."""
        features = compact(features)
        self.fixed.append((features[features != NONE], reason))

    def fix_all(self, reason: str) -> None:
        """Nothing that was seen so far may turn."""
        for axis in self.axes.values():
            self.fixed.append((axis.features, reason))

    def note_flag(self, features: Tensor, flag: str) -> None:
        """Remember a property: 'residual' (added to another branch), 'contracted', 'mixed' (over tokens), 'centred', 'normed'."""
        features = compact(features)
        self.flags.append((features[features != NONE], flag))

    def mark(self) -> tuple[int, ...]:
        """The present end of each list, for `forget_since`."""
        return tuple(map(len, self._lists()))

    def forget_since(self, mark: tuple[int, ...]) -> None:
        """Take back all facts noted after the mark."""
        for facts, end in zip(self._lists(), mark, strict=True):
            del facts[end:]

    def _lists(self) -> list[list]:
        return [self.same, self.together, self.fixed, self.split, self.flags, self.norms, self.factors]


def compact(features: Tensor) -> Tensor:
    """The same features with every dim along which they do not vary cut down to size 1."""
    for dim, size in enumerate(features.shape):
        if size > 1:
            first = features.narrow(dim, 0, 1)
            if features.stride(dim) == 0 or bool((features == first).all()):
                features = first
    return features


def varies(features: Tensor) -> list[int]:
    """The dims along which features vary."""
    return [dim for dim, size in enumerate(compact(features).shape) if size > 1]


def components(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The connected components of a graph: for each of `count` nodes the lowest number in its component."""
    if not pairs:
        return torch.arange(count)
    a, b = (torch.cat(ends).numpy() for ends in zip(*pairs, strict=True))
    _, labels = connected_components(coo_array((np.ones(len(a)), (a, b)), (count, count)), directed=False)
    _, lowest = np.unique(labels, return_index=True)
    return torch.from_numpy(lowest[labels])


def signatures(root: Tensor, together: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A number for each root; two roots have the same if every operation takes them alike.

    Each pair of an operation and a key is a random number; the sum of those under which a root occurs stands for the set.
    """
    random = torch.Generator().manual_seed(0)
    sums = torch.zeros(len(root), dtype=torch.int64)
    for features, keys in together:
        if len(keys):
            numbers = torch.randint(-(2**62), 2**62, (int(keys.max()) + 1,), generator=random)
            sums.scatter_add_(0, root[features], numbers[keys])
    return sums
