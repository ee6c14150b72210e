"""Carry a change of basis out: on the weights, and on what the optimizer remembers of their gradients.

A rotation x -> Q x of some features turns each axis that holds them: `W <- Q W` where W writes them, `W <- W Qᵀ` where it reads
them, which on a tensor's axis is one and the same sum. The gradient turns as the weights do, and so does every average of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.symmetry import Fold, Part, Symmetry
from hf_teleport.optimizers.state import OptimizerState


@dataclass
class Turn:
    """A change of basis that leaves the model's function as it is.

    Attributes:
        rotations: for each symmetry its orthogonal matrices (H, k, k); for one of kind 'scaling' positive factors (H, 1, 1).
        shares: for each symmetry the share of each coordinate in the squared gradients, (H, k): the optimizer's averages of
            squares keep their sums along a turned axis, and are spread by them; default: they turn as `OptimizerState` has it.
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
            known = {fold.norm.gain for fold in self.gains}  # which another symmetry of the same norm may fold too
            self.gains |= {fold: effective(fold.norm).clone() for fold in symmetry.folds if fold.norm.gain not in known}

    @property
    def exact(self) -> bool:
        """Whether the function is the same to rounding errors: no gain was made uniform."""
        return not self._rounded

    @torch.no_grad()
    def carry_out(self, state: OptimizerState | None = None) -> None:
        """Fold the gains, then turn all axes; the optimizer's state goes along."""
        for rounded in self._rounded:
            rounded.fill_(float(rounded.mean()))
        for fold, gain in self.gains.items():
            _scale_gain(fold, gain, state)
        for symmetry, part, matrix in self._steps():
            _turn(part, matrix, state, self.shares.get(symmetry))
        for symmetry in self.rotations:
            for gain in symmetry.gains:
                if state is not None:
                    state.level(gain)

    @torch.no_grad()
    def take_back(self, state: OptimizerState | None = None) -> None:
        """The inverse. Second moments, which a turn mixes, do not come back."""
        for _, part, matrix in reversed(list(self._steps())):
            scaling = matrix.shape[-1] == 1
            _turn(part, 1 / matrix if scaling else matrix.mT, state)
        for fold, gain in reversed(list(self.gains.items())):
            _scale_gain(fold, 1 / gain, state)
        for rounded, before in self._rounded.items():
            rounded.copy_(before)

    def gradients(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The gradients as they are after the turn; those of norm gains, which do not turn, are left out."""
        turned = folded(self.gains, gradients)
        for _, part, matrix in self._steps():
            if part.parameter in turned:
                scaled = 1 / matrix if matrix.shape[-1] == 1 else matrix
                turned[part.parameter] = turn_axis(turned[part.parameter].clone(), part, scaled)
        gains = {gain for symmetry in self.rotations for gain in symmetry.gains}
        return {parameter: gradient for parameter, gradient in turned.items() if parameter not in gains}

    def _steps(self) -> Iterator[tuple[Symmetry, Part, Tensor]]:
        for symmetry, matrices in self.rotations.items():
            for part in symmetry.parts:
                reciprocal = symmetry.kind == "scaling" and part.reads
                yield symmetry, part, 1 / matrices if reciprocal else matrices


@torch.no_grad()
def unfold(fold: Fold, gain: Tensor, state: OptimizerState | None = None) -> None:
    """Give a norm whose gain was folded (it multiplies with one) this gain, and divide its readers by it.

    Args:
        gain: what the norm is to multiply with, (d,) in float64, so that an offset leaves its last digits.
    """
    own = fold.norm.gain
    _scale_gain(fold, 1 / gain.to(own), state)
    own.copy_(gain - fold.norm.offset)


def folded(gains: dict[Fold, Tensor], gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The gradients that the weights would have with the gains folded into them: `W' = W diag(g)` has `G diag(1/g)`."""
    gradients = dict(gradients)
    for fold, gain in gains.items():
        for parameter, dim, elements in fold.readers:
            if parameter in gradients:
                gradients[parameter] = gradients[parameter] / _along(gain[elements.to(gain.device)], parameter, dim)
        if fold.norm.bias in gradients:
            gradients[fold.norm.bias] = gradients[fold.norm.bias] * gain
    return gradients


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
        state.turn(part, of_gradient, turn_axis)
        if shares is not None:
            state.put_shares(part, shares)


def _scale_gain(fold: Fold, gain: Tensor, state: OptimizerState | None) -> None:
    """Divide the norm by a gain and multiply its readers with it."""
    norm, now = fold.norm, effective(fold.norm)
    # A gain of zero can be multiplied into readers, and the norm has one left.
    norm.gain.copy_(torch.where(now == gain, 1, now / gain) - norm.offset)
    divisor = torch.where(gain == 0, 1, gain)
    scaled = [(norm.gain, 0, 1 / divisor)]
    if norm.bias is not None:
        norm.bias.div_(divisor)
        scaled.append((norm.bias, 0, 1 / divisor))
    for parameter, dim, elements in fold.readers:
        factors = gain[elements.to(gain.device)]
        parameter.mul_(_along(factors, parameter, dim))
        scaled.append((parameter, dim, factors))
    if state is not None:
        for parameter, dim, factors in scaled:
            state.scale(parameter, dim, 1 / torch.where(factors == 0, 1, factors))


def _along(factors: Tensor, parameter: Tensor, dim: int) -> Tensor:
    shape = [1] * parameter.dim()
    shape[dim] = -1
    return factors.reshape(shape).to(parameter)
