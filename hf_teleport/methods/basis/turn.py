"""Carry a change of basis out: on the weights, and on what the optimizer remembers of their gradients.

A rotation x -> Q x of some features turns each axis that holds them: `W <- Q W` if W writes them, `W <- W Qᵀ` if W reads them. On
a tensor's axis both are the same sum. The gradient turns as the weights do, and so does every average of it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.symmetry import Fold, Part, Symmetry, folds_of
from hf_teleport.optimizers.state import OptimizerState, laid_along
from hf_teleport.weights.whole import WHOLE, Weights

_Change = Callable[[OptimizerState | None], None]


@dataclass
class Turn:
    """A change of basis that leaves the model's function as it is.

    Attributes:
        rotations: for each symmetry its orthogonal matrices (H, k, k); for one of kind 'scaling' positive factors (H, 1, 1).
        shares: for each symmetry the share of each coordinate in the squared gradients, (H, k). The optimizer's averages of
            squares keep their sums along a turned axis, and are spread by the shares. Default: as `OptimizerState` says.
        gains: for each fold what its norm multiplies with before.
    """

    rotations: dict[Symmetry, Tensor]
    shares: dict[Symmetry, Tensor] = field(default_factory=dict)
    gains: dict[Fold, Tensor] = field(default_factory=dict, init=False)
    _rounded: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for symmetry in self.rotations:
            for gain in symmetry.rounded:
                self._rounded[gain] = gain.detach().clone()
        self.gains = {fold: effective(fold.norm).clone() for fold in folds_of(self.rotations)}

    @property
    def exact(self) -> bool:
        """Whether the function is the same to rounding errors: no gain was made uniform."""
        return not self._rounded

    @torch.no_grad()
    def carry_out(self, state: OptimizerState | None = None, weights: Weights = WHOLE) -> None:
        """Fold the gains, then turn all axes, one parameter after the other; the optimizer's state goes along.

        Args:
            weights: those that the parameters belong to. A sharded one is whole only if its rows are mixed, and only meanwhile.
        """
        changes = self._changes()
        for parameter in weights.in_order(changes):
            axes = {axis for axis, _ in changes[parameter]}
            with weights.changing(parameter, axes, None if state is None else state.state):
                for _, change in changes[parameter]:
                    change(state)

    def _changes(self) -> dict[nn.Parameter, list[tuple[int, _Change]]]:
        """For each parameter what is done to it in turn, each with the axis along which it is done."""
        changes: dict[nn.Parameter, list[tuple[int, _Change]]] = defaultdict(list)
        for rounded in self._rounded:
            changes[rounded].append((0, partial(_even_out, rounded)))
        for fold, gain in self.gains.items():
            for parameter, dim, change in _scalings(fold, gain):
                changes[parameter].append((dim, change))
        for symmetry, part, matrix in self._steps():
            changes[part.parameter].append((part.dim, partial(_turn, part, matrix, shares=self.shares.get(symmetry))))
        for gain in self._levelled:
            changes[gain].append((0, partial(_level, gain)))
        return changes

    @torch.no_grad()
    def take_back(self, state: OptimizerState | None = None) -> None:
        """The inverse. Second moments, which a turn mixes, do not come back."""
        for _, part, matrix in reversed(list(self._steps())):
            scaling = matrix.shape[-1] == 1
            _turn(part, 1 / matrix if scaling else matrix.mT, state)
        for fold, gain in reversed(list(self.gains.items())):
            for _, _, change in _scalings(fold, 1 / gain):
                change(state)
        for rounded, before in self._rounded.items():
            rounded.copy_(before)

    def gradients(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The gradients as they are after the turn; those of norm gains, which do not turn, are left out."""
        return dict(self.turned(gradients))

    def turned(self, gradients: dict[nn.Parameter, Tensor], weights: Weights = WHOLE) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """As `gradients`, one after the other.

        Args:
            gradients: laid out as `weights`, those that the parameters belong to; so is what is yielded.
        """
        steps = defaultdict(list)
        for _, part, matrix in self._steps():
            steps[part.parameter].append((part, 1 / matrix if matrix.shape[-1] == 1 else matrix))
        scaled = reciprocals(self.gains)

        def change(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
            for dim, factors in scaled[parameter]:
                gradient = gradient * laid_along(factors, dim, gradient)
            for part, matrix in steps[parameter]:
                gradient = turn_axis(gradient.clone(), part, matrix)
            return gradient

        for parameter in weights.in_order(gradients):
            if parameter not in self._levelled:
                axes = {part.dim for part, _ in steps[parameter]} | {dim for dim, _ in scaled[parameter]}
                yield parameter, weights.changed(parameter, gradients[parameter], axes, partial(change, parameter))

    @property
    def _levelled(self) -> dict[nn.Parameter, None]:
        """The gains, whose gradients after the turn are others altogether."""
        return dict.fromkeys(gain for symmetry in self.rotations for gain in symmetry.gains)

    def _steps(self) -> Iterator[tuple[Symmetry, Part, Tensor]]:
        for symmetry, matrices in self.rotations.items():
            for part in symmetry.parts:
                reciprocal = symmetry.kind == "scaling" and part.reads
                yield symmetry, part, 1 / matrices if reciprocal else matrices


@torch.no_grad()
def unfold(fold: Fold, gain: Tensor, state: OptimizerState | None = None, weights: Weights = WHOLE) -> None:
    """Give a norm whose gain was folded (it multiplies with one) this gain, and divide its readers by it.

    Args:
        gain: what the norm is to multiply with, (d,) in float64, so that an offset leaves its last digits.
        weights: those that the parameters belong to.
    """
    own = fold.norm.gain
    for parameter, dim, change in _scalings(fold, 1 / gain.to(own)):
        with weights.changing(parameter, [dim], None if state is None else state.state):
            change(state)
    with weights.changing(own, [0]):
        own.copy_(gain - fold.norm.offset)


def folded(gains: dict[Fold, Tensor], gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The gradients that the weights would have with the gains folded into them: `W' = W diag(g)` has `G diag(1/g)`."""
    gradients = dict(gradients)
    for parameter, scaled in reciprocals(gains).items():
        for dim, factors in scaled if parameter in gradients else ():
            gradients[parameter] = gradients[parameter] * laid_along(factors, dim, parameter)
    return gradients


def reciprocals(gains: dict[Fold, Tensor]) -> dict[nn.Parameter, list[tuple[int, Tensor]]]:
    """For each parameter the axes along which folding multiplies its gradient, and the factors."""
    factors = defaultdict(list)
    for fold, gain in gains.items():
        for parameter, dim, elements in fold.readers:
            factors[parameter].append((dim, 1 / gain[elements.to(gain.device)]))
        if fold.norm.bias is not None:
            factors[fold.norm.bias].append((0, gain))
    return factors


def slices(tensor: Tensor, part: Part) -> Tensor:
    """The features of a part as rows, (H, r, k, n), of a tensor shaped like its parameter."""
    rows = tensor.movedim(part.dim, 0)[part.positions.flatten().to(tensor.device)]
    return rows.reshape(*part.positions.shape, -1)


def turn_axis(tensor: Tensor, part: Part, matrices: Tensor) -> Tensor:
    """Turn a tensor shaped like the part's parameter in place, by matrices (H, k, k), and return it."""
    # An optimizer's state may be in half precision.
    rows = slices(tensor, part).to(torch.promote_types(tensor.dtype, torch.float32))
    turned = (matrices.to(rows).unsqueeze(1) @ rows).to(tensor.dtype)
    view = tensor.movedim(part.dim, 0)
    view[part.positions.flatten().to(tensor.device)] = turned.reshape(-1, *view.shape[1:])
    return tensor


def _turn(part: Part, matrices: Tensor, state: OptimizerState | None, shares: Tensor | None = None) -> None:
    turn_axis(part.parameter.data, part, matrices)
    if state is not None:
        # A scaled weight has the reciprocally scaled gradient; a turned one's turns alike.
        of_gradient = 1 / matrices if matrices.shape[-1] == 1 else matrices
        state.turn(part, of_gradient, turn_axis, shares)


def _scalings(fold: Fold, gain: Tensor) -> Iterator[tuple[nn.Parameter, int, _Change]]:
    """What divides the norm by a gain and multiplies its readers with it: for each parameter the axis, and the change."""
    norm = fold.norm
    yield norm.gain, 0, partial(_divide, norm.gain, norm.offset, gain)
    if norm.bias is not None:
        yield norm.bias, 0, partial(_multiply, norm.bias, 0, 1 / torch.where(gain == 0, 1, gain))
    for parameter, dim, elements in fold.readers:
        yield parameter, dim, partial(_multiply, parameter, dim, gain[elements.to(gain.device)])


def _divide(parameter: nn.Parameter, offset: float, gain: Tensor, state: OptimizerState | None) -> None:
    """Divide a norm's gain, `offset` more than its parameter: divided by itself it is exactly one.

    A gain of zero too, for it can be multiplied into the norm's readers.
    """
    now = parameter + offset
    parameter.copy_(torch.where(now == gain, 1, now / gain) - offset)
    if state is not None:
        state.scale(parameter, 0, torch.where(gain == 0, 1, gain))


def _multiply(parameter: nn.Parameter, dim: int, factors: Tensor, state: OptimizerState | None) -> None:
    parameter.mul_(laid_along(factors, dim, parameter))
    if state is not None:
        state.scale(parameter, dim, 1 / torch.where(factors == 0, 1, factors))


def _even_out(gain: nn.Parameter, state: OptimizerState | None) -> None:
    gain.fill_(float(gain.mean()))


def _level(gain: nn.Parameter, state: OptimizerState | None) -> None:
    if state is not None:
        state.level(gain)
