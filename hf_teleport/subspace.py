"""Core and null space of a layer's inputs (paper: representation matrix, energy threshold, equations 3 to 13).

With a layer's input as rows X (N x d), the core space is spanned by the leading right singular vectors of X, k of them, k the
smallest number with `σ₁² + ... + σₖ² >= tau (σ₁² + ... + σ_d²)`; the vector that reaches the threshold is kept in the core. The
null space is the rest. A weight change `Δ P` with `P = I - B Bᵀ` has `X (Δ P)ᵀ = 0` at tau = 1: no output changes.

All functions take leading group dimensions: (G, N, d) for a convolution with G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Share of a matrix below which what a projection leaves of it is projected once more.
_LITTLE = 0.1

# Rows x width above which a layer's input is taken in slices, to bound the memory of the float64 copy.
_SLICE = 2**24


def rank_tolerance(width: int, dtype: torch.dtype) -> float:
    """Singular values up to this share of the largest count as zero: `sqrt(d) * eps(dtype)`.

    It is the size of the rounding noise that a layer's input of that precision carries, relative to its largest singular
    value. Unlike the common `max(N, d) * eps` it does not grow with the number of tokens, with which a real but weak
    direction would be taken for a null one and the loss would move.
    """
    return width**0.5 * torch.finfo(dtype).eps


class Representation:
    """A summary of all rows seen so far, from which their right singular vectors follow; at most d x d numbers.

    As long as there are fewer rows than columns, the rows themselves are kept and decomposed in full precision. Beyond, inputs of
    single precision or less go into the Gram matrix `C = XᵀX` in float64: it squares the condition number, but float64 resolves
    the square of anything that float32 rounding left meaningful. Float64 inputs are reduced by QR instead.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.dtype = torch.float32
        self._rows: Tensor | None = None
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in more rows, (G, N, d) of any floating dtype."""
        groups, num_rows, width = rows.shape
        self.num_rows += num_rows
        self.dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        for part in rows.split(max(1, _SLICE // (groups * width)), dim=1):
            part = part.double()
            if self._gram is not None:
                self._gram.baddbmm_(part.mT, part)
                continue
            self._rows = part if self._rows is None else torch.cat([self._rows, part], dim=1)
            if self._rows.shape[1] > width:
                if self.dtype == torch.float64:
                    self._rows = torch.linalg.qr(self._rows, mode="r").R
                else:
                    self._gram, self._rows = self._rows.mT @ self._rows, None

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Singular values (G, r), largest first, and right singular vectors (G, d, r), in float64.

        r = d once there are at least d rows, else the number of rows.
        """
        if self._gram is not None:
            values, vectors = torch.linalg.eigh(self._gram)
            return values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
        if self._rows is None:
            raise ValueError("a representation without rows has no singular vectors; add() rows first")
        _, values, vectors = torch.linalg.svd(self._rows, full_matrices=False)
        return values, vectors.mT


@dataclass(frozen=True)
class Subspace:
    """The projection onto a null space, kept as whichever of its two bases is smaller.

    Attributes:
        basis: orthonormal columns, (G, d, k); columns that do not belong to a group are zero.
        spans_null: whether the basis spans the null space (else its complement, the core).
        null_dim: dimension of the null space, summed over groups.
        dim: d, summed over groups.
    """

    basis: Tensor
    spans_null: bool
    null_dim: int
    dim: int

    def project(self, matrix: Tensor) -> Tensor:
        """`M P` for M (G, o, d): its part in the null space."""
        part = (matrix @ self.basis) @ self.basis.mT
        if self.spans_null:
            return part
        rest = matrix - part
        # Where little is left, rounding of the large part taken off is in it too. A second projection takes that off.
        if rest.norm() < _LITTLE * matrix.norm():
            rest = rest - (rest @ self.basis) @ self.basis.mT
        return rest


def core_dims(singular_values: Tensor, energy_threshold: float, tolerance: float) -> Tensor:
    """k for each group, (G,): the smallest number of leading values that holds `tau` of the energy, at most the rank.

    Args:
        singular_values: (G, r), largest first.
        energy_threshold: tau in (0, 1]; 1 asks for the numerical rank.
        tolerance: values up to `tolerance * largest` count as zero.
    """
    rank = (singular_values > tolerance * singular_values[..., :1]).sum(-1)
    if energy_threshold == 1:
        return rank
    energy = singular_values.square().cumsum(-1)
    reached = (energy < energy_threshold * energy[..., -1:]).sum(-1) + 1
    return torch.minimum(rank, reached)


def null_space(representation: Representation, energy_threshold: float, dtype: torch.dtype | None = None) -> Subspace:
    """The null space of the rows seen, at an energy threshold tau.

    Args:
        representation: the rows, d wide.
        energy_threshold: tau in (0, 1].
        dtype: of the basis; default: that of the rows, at least float32.
    """
    values, vectors = representation.decompose()
    groups, width, found = vectors.shape
    dtype = dtype or representation.dtype
    dims = core_dims(values, energy_threshold, rank_tolerance(width, representation.dtype))
    in_core = torch.arange(found, device=dims.device) < dims[:, None]
    largest, smallest = int(dims.max()), int(dims.min())
    # Only a full decomposition (found = width) holds null vectors to keep.
    spans_null = found == width and width - smallest < largest
    kept = ~in_core if spans_null else in_core
    columns = slice(smallest, None) if spans_null else slice(largest)
    basis = (vectors * kept[:, None, :])[..., columns]
    return Subspace(basis.to(dtype).contiguous(), spans_null, groups * width - int(dims.sum()), groups * width)
