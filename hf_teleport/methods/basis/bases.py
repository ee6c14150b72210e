"""Choices of basis: from what a few batches show, an orthogonal matrix for each block of features.

Adam scales each coordinate by its own second moment. So it fits best if the gradients of different coordinates are
uncorrelated: in the eigenvectors of the gradient's second moment. SOAP (arXiv 2409.11321) refreshes them during all of training.
Another paper (arXiv 2410.19964) measures what a basis does to Adam.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_teleport.layers.point import Point
from hf_teleport.layers.subspace import converging
from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.moments import Moments
from hf_teleport.methods.basis.smallest import smallest_turn
from hf_teleport.methods.basis.symmetry import Fold, Part, Symmetry, folds_of
from hf_teleport.methods.basis.turn import folded, slices
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.shards import whole_of
from hf_teleport.weights.whole import WHOLE, Weights


class Basis:
    """Observe some batches, then choose a basis for each symmetry. This one needs no batch, and turns nothing.

    Args:
        symmetries: those that will be turned.
        moments: the gradients' second moments, gathered elsewhere.
    """

    def __init__(self, symmetries: list[Symmetry], seed: int, moments: Moments | None = None):
        self.symmetries = symmetries
        self.seed = seed

    @cached_property
    def _gains(self) -> dict[Fold, Tensor]:
        return {fold: effective(fold.norm) for fold in folds_of(self.symmetries)}

    def observe(self, point: Point) -> None:
        """Take in one batch."""
        self.see(point.by_parameter, point)

    def see(self, gradients: dict[nn.Parameter, Tensor], point: Point) -> None:
        """Take in one batch's gradients, as they are before the gains are folded."""

    def merge(self, ranks: Ranks) -> None:
        """Every batch was seen: take in what other processes saw of their shares. The gradients are the mean already."""

    def choose(self, symmetry: Symmetry) -> Tensor:
        """The matrices to turn a symmetry by: orthogonal, (H, k, k) in float64. Row i is the new coordinate i."""
        return torch.eye(symmetry.size, dtype=torch.float64).expand(symmetry.blocks, -1, -1)


class _SecondMoment(Basis):
    """Eigenvectors of a sum of second moments (H, k, k), each with trace one."""

    def __init__(self, symmetries: list[Symmetry], seed: int, moments: Moments | None = None):
        super().__init__(symmetries, seed, moments)
        self._moments: dict[Symmetry, Tensor] = {}

    def _add(self, symmetry: Symmetry, moment: Tensor) -> None:
        """Add a second moment (H, k, k), brought to trace one."""
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(moment.dtype).tiny)
        moment = moment / trace[:, None, None]
        known = self._moments.get(symmetry)
        self._moments[symmetry] = moment if known is None else known.add_(moment.to(known.device))

    def choose(self, symmetry: Symmetry) -> Tensor:
        moment = self._moments.get(symmetry)
        if moment is None:
            return super().choose(symmetry)
        moment = moment.double()
        if not symmetry.centred:
            return smallest_turn(moment)
        inside = mean_free(symmetry.size, moment)
        return _with_mean(smallest_turn(inside.mT @ moment @ inside), inside)


class GradientMoment(_SecondMoment):
    """Eigenvectors of the gradients' second moments, gathered in training or from the teleport batches."""

    def __init__(self, symmetries: list[Symmetry], seed: int, moments: Moments | None = None):
        super().__init__(symmetries, seed, moments)
        self._own = Moments(symmetries) if moments is None else None
        self._moments = (moments or self._own).values  # type: ignore[union-attr]

    def see(self, gradients: dict[nn.Parameter, Tensor], point: Point) -> None:
        if self._own is not None:
            self._own.look(gradients)


class ActivationCovariance(_SecondMoment):
    """Eigenvectors of the second moments of what the weights read. Spaces that no weight reads (query-key) stay."""

    def __init__(self, symmetries: list[Symmetry], seed: int, moments: Moments | None = None):
        super().__init__(symmetries, seed, moments)
        self._sums: dict[tuple[Symmetry, int], Tensor] = {}

    def see(self, gradients: dict[nn.Parameter, Tensor], point: Point) -> None:
        factors = {(p, dim): (gain, elements) for fold, gain in self._gains.items() for p, dim, elements in fold.readers}
        for symmetry, i, part in self._readers():
            for region, uses in point.trace.uses.get(part.parameter, {}).items():
                if sorted(region.shape) != sorted(whole_of(part.parameter).shape):
                    continue  # a part of a fused weight, with other inputs than its neighbour
                for use in uses:
                    rows = use.call.projector.rows(use.call.input.detach()).flatten(0, 1)
                    if (part.parameter, part.dim) in factors:
                        gain, elements = factors[part.parameter, part.dim]
                        rows = rows / gain[elements.to(gain.device)].to(rows)
                    own = rows[:, part.positions.flatten().to(rows.device)].mT
                    own = own.reshape(*part.positions.shape, -1).transpose(1, 2).flatten(2)
                    self._sums[symmetry, i] = self._sums.get((symmetry, i), 0) + own @ own.mT

    def merge(self, ranks: Ranks) -> None:
        readers = list(self._readers())
        like = (p.parameter.new_empty(s.blocks, s.size, s.size) for s, _, p in readers)
        means = ranks.mean_tensors([self._sums.get((symmetry, i)) for symmetry, i, _ in readers], like)
        for (symmetry, _, _), moment in zip(readers, means, strict=True):
            if moment is not None:
                self._add(symmetry, moment)

    def _readers(self) -> Iterator[tuple[Symmetry, int, Part]]:
        """Every part that reads its features, with its number in its symmetry."""
        for symmetry in self.symmetries:
            yield from ((symmetry, i, part) for i, part in enumerate(symmetry.parts) if part.reads)


class PredictedDecrease(Basis):
    """A rotation that climbs what a sign-like optimizer expects to gain from a step, `||g||_1`.

    `Q <- polar(sign(Q G) Gᵀ)` never lowers the sum of absolute values of Q G: it maximises the tangent of a convex function. Each
    symmetry is climbed with the others at rest.
    """

    _ITERATIONS = 20

    def __init__(self, symmetries: list[Symmetry], seed: int, moments: Moments | None = None):
        super().__init__(symmetries, seed, moments)
        self._sums: dict[nn.Parameter, Tensor] = {}

    def see(self, gradients: dict[nn.Parameter, Tensor], point: Point) -> None:
        gradients = folded(self._gains, gradients)
        for parameter in {part.parameter for symmetry in self.symmetries for part in symmetry.parts}:
            if parameter in gradients:
                known = self._sums.get(parameter)
                self._sums[parameter] = gradients[parameter].clone() if known is None else known.add_(gradients[parameter])

    def choose(self, symmetry: Symmetry) -> Tensor:
        rows = [
            slices(self._sums[p.parameter], p).transpose(1, 2).flatten(2) for p in symmetry.parts if p.parameter in self._sums
        ]
        if not rows:
            return super().choose(symmetry)
        gradient = torch.cat(rows, -1).double()  # (H, k, n)
        inside = mean_free(symmetry.size, gradient) if symmetry.centred else torch.eye(symmetry.size).to(gradient)
        matrix = torch.eye(symmetry.size).to(gradient).expand(symmetry.blocks, -1, -1)
        for _ in range(self._ITERATIONS):
            left, _, right = converging(torch.linalg.svd, inside.mT @ (matrix @ gradient).sign() @ gradient.mT @ inside)
            matrix = _with_mean(left @ right, inside) if symmetry.centred else left @ right
        return matrix


class Identity(Basis):
    """No rotation: the control for what an event does beside turning, folding gains and resetting the optimizer's state."""


class Random(Basis):
    """A random rotation: the control for the choice of basis."""

    def choose(self, symmetry: Symmetry) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + self.symmetries.index(symmetry))
        size = symmetry.size - symmetry.centred
        normal = torch.randn(symmetry.blocks, size, size, dtype=torch.float64, generator=generator)
        matrix, triangle = torch.linalg.qr(normal)
        matrix = matrix * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over all rotations
        return _with_mean(matrix, mean_free(symmetry.size, matrix)) if symmetry.centred else matrix


def mean_free(size: int, like: Tensor) -> Tensor:
    """An orthonormal basis (size, size - 1) of the vectors whose mean is zero, each as near to a coordinate as can be.

    It is the reflection that takes the last coordinate to the vector of ones, without its last column.
    """
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal = -ones.clone()
    normal[-1] += 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.square().sum().clamp_min(1e-300)
    return reflection[:, :-1].to(like)


def _with_mean(inside: Tensor, basis: Tensor) -> Tensor:
    """A rotation of the mean-free vectors (H, k - 1, k - 1), and the vector of ones kept: (H, k, k)."""
    size = basis.shape[0]
    return basis @ inside @ basis.mT + torch.full((size, size), 1 / size, dtype=basis.dtype, device=basis.device)


BASES: dict[str, type[Basis]] = {
    "gradient": GradientMoment,
    "predicted_decrease": PredictedDecrease,
    "activation": ActivationCovariance,
    "random": Random,
    "identity": Identity,
}


def balance(symmetry: Symmetry, weights: Weights = WHOLE) -> Tensor:
    """The factors (H, 1, 1) of single features that make what writes each as long as what reads it."""
    writes, reads = (_squares(symmetry, weights, reads=side) for side in (False, True))
    return torch.where((writes > 0) & (reads > 0), (reads / writes).pow(0.25), 1.0)[:, None, None]


def _squares(symmetry: Symmetry, weights: Weights, *, reads: bool) -> Tensor:
    """For each feature (H,) the squared length of what reads it, or of what writes it."""
    total = torch.zeros(symmetry.blocks)
    for part in symmetry.parts:
        if part.reads is reads:
            with weights.reading([part.parameter]):
                total = total + slices(part.parameter.detach(), part).double().square().sum((1, 2, 3))
    return total
