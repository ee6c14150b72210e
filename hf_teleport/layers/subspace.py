"""Core and null space of a layer's inputs (paper: representation matrix, energy threshold, equations 3 to 13).

A layer's input is rows X (N x d). The first k right singular vectors of X span the core space, and k is the smallest number with
`σ₁² + ... + σₖ² >= tau (σ₁² + ... + σ_d²)`. The vector that reaches the threshold belongs to the core. The null space is the
rest. A weight change `Δ P` with `P = I - B Bᵀ` has `X (Δ P)ᵀ = 0` at tau = 1: no output changes.

All functions take leading group dimensions: (G, N, d) for a convolution with G groups.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Share of a matrix below which what a projection leaves of it is projected once more.
_LITTLE = 0.1

# Rows x width above which a layer's input is taken in slices, to bound the memory of the float64 copy.
_SLICE = 2**24

# Width of a block of a Gram matrix, at least: narrower ones multiply more slowly.
_BLOCK = 128


def rank_tolerance(width: int, dtype: torch.dtype) -> float:
    """Singular values up to this share of the largest count as zero: `sqrt(d) * eps(dtype)`.

    It is the size of the rounding noise in a layer's input of that precision, relative to its largest singular value. The common
    `max(N, d) * eps` grows with the number of tokens. It would take a real but weak direction for a null one, and the loss would
    move.
    """
    return width**0.5 * torch.finfo(dtype).eps


class Representation:
    """A summary of all rows seen so far, from which their right singular vectors follow; at most d x d numbers.

    As long as there are fewer rows than columns, the rows themselves are kept and decomposed in full precision. Beyond, inputs of
    single precision or less go into the Gram matrix `C = XᵀX` in float64. It squares the condition number, but float64 resolves
    the square of anything above float32's rounding. Float64 inputs are reduced by QR instead.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.dtype = torch.float32
        self.rows: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in more rows, (G, N, d) of any floating dtype."""
        groups, num_rows, width = rows.shape
        self.num_rows += num_rows
        self.dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        for part in rows.split(max(1, _SLICE // (groups * width)), dim=1):
            self.keep(part.double())

    def keep(self, rows: Tensor) -> None:
        """Join float64 rows, or the triangle of a QR that stands for them, to what is kept."""
        if self.gram is not None:
            self.gram = self.gram + _gram(rows)  # not in place: a copy of this object may hold the old one
            return
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=1)
        if self.rows.shape[1] > rows.shape[2]:
            if self.dtype == torch.float64:
                self.rows = torch.linalg.qr(self.rows, mode="r").R
            else:
                self.square()

    def square(self) -> Tensor:
        """Go over from rows to their Gram matrix, and return it."""
        if self.gram is None:
            if self.rows is None:
                raise ValueError("a representation without rows has no Gram matrix; add() rows first")
            self.gram, self.rows = _gram(self.rows), None
        return self.gram

    def has_full_rank(self) -> bool:
        """Whether all min(N, d) singular values surely count: seen from a Cholesky factorisation, cheaper than decomposing.

        `C - s` has one only if no eigenvalue of C is as small as s, the square of the tolerance. Float64 rows never show it: that
        square is below what a Gram matrix resolves.
        """
        kept = self.gram if self.rows is None else self.rows
        if kept is None or self.dtype == torch.float64:
            return False
        gram = kept if self.rows is None else kept @ kept.mT
        # The norm is at least the largest eigenvalue.
        shift = rank_tolerance(kept.shape[-1], self.dtype) ** 2 * torch.linalg.matrix_norm(gram)
        factor, failed = torch.linalg.cholesky_ex(gram - shift[..., None, None] * torch.eye(gram.shape[-1]).to(gram))
        return not bool(failed.any()) and bool(factor.isfinite().all())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Singular values (G, r), largest first, and right singular vectors (G, d, r), in float64.

        r = d once there are at least d rows, else the number of rows.

        Raises:
            ValueError: no rows.
            LinAlgError: no algorithm converges, on any device; rows that are not finite, for instance.
        """
        if self.gram is not None:
            values, vectors = converging(torch.linalg.eigh, self.gram)
            return values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
        if self.rows is None:
            raise ValueError("a representation without rows has no singular vectors; add() rows first")
        _, values, vectors = converging(lambda rows: torch.linalg.svd(rows, full_matrices=False), self.rows)
        return values, vectors.mT


def _gram(rows: Tensor) -> Tensor:
    """`XᵀX`, (G, d, d), of which only the blocks on and above the diagonal are multiplied out."""
    width = rows.shape[-1]
    gram = rows.new_empty(len(rows), width, width)
    step = max(_BLOCK, -(-width // 8))
    for start in range(0, width, step):
        end = start + step
        gram[:, start:end, start:] = rows[..., start:end].mT @ rows[..., start:]
        gram[:, end:, start:end] = gram[:, start:end, end:].mT
    return gram


def converging(decompose: Callable[[Tensor], Any], matrix: Tensor) -> tuple[Tensor, ...]:
    """A decomposition that is finite: on the matrix's own device, or if that fails, in float64 on the CPU.

    Raises:
        LinAlgError: it fails there too.
    """
    try:
        parts = tuple(decompose(matrix))
        if all(part.isfinite().all() for part in parts):
            return parts
        problem = "its result is not finite"
    except torch.linalg.LinAlgError as error:
        problem = str(error)
    logger.warning(
        "A decomposition failed on %s (%s); it is tried in float64 on the CPU, which takes longer and gives the same. There is "
        "nothing to do, unless the layer is left out then.",
        matrix.device,
        problem,
    )
    parts = tuple(decompose(matrix.double().cpu()))
    if not all(part.isfinite().all() for part in parts):
        raise torch.linalg.LinAlgError(problem)
    return tuple(part.to(matrix) for part in parts)


@dataclass(frozen=True)
class Subspace:
    """The projection onto a null space, kept as whichever of its two bases is smaller.

    Attributes:
        basis: orthonormal columns, (G, d, k); columns that do not belong to a group are zero.
        spans_null: whether the basis spans the null space (else its complement, the core).
        null_dim: dimension of the null space, summed over groups.
        dim: d, summed over groups.
        num_rows: how many rows it was found from.
        captured: share of the rows' energy (their squares) that is in the core: 1 at tau = 1, at least tau below.
    """

    basis: Tensor
    spans_null: bool
    null_dim: int
    dim: int
    num_rows: int
    captured: float = 1.0

    def project(self, matrix: Tensor) -> Tensor:
        """`M P` for M (G, o, d): its part in the null space. If that is no more than rounding of M, zeros."""
        part = (matrix @ self.basis) @ self.basis.mT
        rest = part if self.spans_null else matrix - part
        share = rest.norm() / matrix.norm()
        # Where little is left, rounding of the large part taken off is in it too. A second projection takes that off.
        if share < _LITTLE and not self.spans_null:
            rest = rest - (rest @ self.basis) @ self.basis.mT
            share = rest.norm() / matrix.norm()
        return rest if share > rank_tolerance(matrix.shape[-1], matrix.dtype) else torch.zeros_like(rest)


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

    Raises:
        LinAlgError: the decomposition does not converge.
    """
    dtype = dtype or representation.dtype
    if energy_threshold == 1 and representation.has_full_rank():
        return _of_full_rank(representation, dtype)
    values, vectors = representation.decompose()
    groups, width, found = vectors.shape
    dims = core_dims(values, energy_threshold, rank_tolerance(width, representation.dtype))
    in_core = torch.arange(found, device=dims.device) < dims[:, None]
    largest, smallest = int(dims.max()), int(dims.min())
    # Only a full decomposition (found = width) holds null vectors to keep.
    spans_null = found == width and width - smallest < largest
    kept = ~in_core if spans_null else in_core
    columns = slice(smallest, None) if spans_null else slice(largest)
    basis = (vectors * kept[:, None, :])[..., columns]
    null_dim = groups * width - int(dims.sum())
    energy = values.square()
    captured = float((energy * in_core).sum() / energy.sum()) if energy_threshold < 1 and energy.any() else 1.0
    return Subspace(basis.to(dtype).contiguous(), spans_null, null_dim, groups * width, representation.num_rows, captured)


def _of_full_rank(representation: Representation, dtype: torch.dtype) -> Subspace:
    """At tau = 1 any orthonormal basis of the rows' span will do, and none is needed if they span everything."""
    if representation.rows is None:
        gram = representation.square()
        groups, width, _ = gram.shape
        return Subspace(gram.new_zeros(groups, width, 0, dtype=dtype), True, 0, groups * width, representation.num_rows)
    groups, rank, width = representation.rows.shape
    basis, _ = converging(torch.linalg.qr, representation.rows.mT)
    return Subspace(basis.to(dtype).contiguous(), False, groups * (width - rank), groups * width, representation.num_rows)
