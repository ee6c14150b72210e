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

# If a projection leaves less than this share of a matrix, the result is projected once more.
_LITTLE = 0.1

# An input with more numbers than this (rows x width) is processed in slices, to limit the memory of the float64 copy.
_SLICE = 2**24

# Minimal width of the blocks in which a Gram matrix is computed. Narrower blocks multiply more slowly.
_BLOCK = 128


def rank_tolerance(width: int, dtype: torch.dtype) -> float:
    """Singular values up to this share of the largest count as zero: `sqrt(d) * eps(dtype)`.

    It is the size of the rounding noise in a layer's input of that precision, relative to its largest singular value. The common
    `max(N, d) * eps` grows with the number of tokens. It would count a weak but real direction as null, and the loss would
    change.
    """
    return width**0.5 * torch.finfo(dtype).eps


class Representation:
    """A summary of all rows seen so far, in at most d x d numbers. It gives their right singular vectors.

    While there are fewer rows than columns, the rows themselves are kept and decomposed in full precision. With more rows, inputs
    in float32 or lower precision are summed into the Gram matrix `C = XᵀX` in float64. That squares the condition number, but
    float64 resolves the square of anything above float32's rounding. Float64 inputs are reduced by QR instead.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.dtype = torch.float32
        self.rows: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows, (G, N, d) of any floating dtype."""
        groups, num_rows, width = rows.shape
        self.num_rows += num_rows
        self.dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        for part in rows.split(max(1, _SLICE // (groups * width)), dim=1):
            self.keep(part.double())

    def keep(self, rows: Tensor) -> None:
        """Add float64 rows, or the triangle of a QR that replaces them."""
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
        """Replace the rows by their Gram matrix, and return it."""
        if self.gram is None:
            if self.rows is None:
                raise ValueError("a representation without rows has no Gram matrix; add() rows first")
            self.gram, self.rows = _gram(self.rows), None
        return self.gram

    def has_full_rank(self) -> bool:
        """Whether all min(N, d) singular values are certainly above the tolerance.

        A Cholesky factorisation shows it, and is cheaper than a decomposition. `C - s I` has one only if all eigenvalues of C are
        above s, the square of the tolerance. For float64 rows the answer is always False, because a Gram matrix can't resolve
        that square.
        """
        kept = self.gram if self.rows is None else self.rows
        if kept is None or self.dtype == torch.float64:
            return False
        gram = kept if self.rows is None else kept @ kept.mT
        # The Frobenius norm is an upper bound of the largest eigenvalue.
        shift = rank_tolerance(kept.shape[-1], self.dtype) ** 2 * torch.linalg.matrix_norm(gram)
        factor, failed = torch.linalg.cholesky_ex(gram - shift[..., None, None] * torch.eye(gram.shape[-1]).to(gram))
        return not bool(failed.any()) and bool(factor.isfinite().all())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Singular values (G, r), largest first, and right singular vectors (G, d, r), in float64.

        r = d once there are at least d rows, else the number of rows.

        Raises:
            ValueError: no rows.
            LinAlgError: no algorithm converges on any device, for instance because rows are not finite.
        """
        if self.gram is not None:
            values, vectors = converging(torch.linalg.eigh, self.gram)
            return values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
        if self.rows is None:
            raise ValueError("a representation without rows has no singular vectors; add() rows first")
        _, values, vectors = converging(lambda rows: torch.linalg.svd(rows, full_matrices=False), self.rows)
        return values, vectors.mT


def _gram(rows: Tensor) -> Tensor:
    """`XᵀX`, (G, d, d). Only the blocks on and above the diagonal are computed; the others are their transposes."""
    width = rows.shape[-1]
    gram = rows.new_empty(len(rows), width, width)
    step = max(_BLOCK, -(-width // 8))
    for start in range(0, width, step):
        end = start + step
        gram[:, start:end, start:] = rows[..., start:end].mT @ rows[..., start:]
        gram[:, end:, start:end] = gram[:, start:end, end:].mT
    return gram


def converging(decompose: Callable[[Tensor], Any], matrix: Tensor) -> tuple[Tensor, ...]:
    """Decompose a matrix on its own device. If that fails or is not finite, decompose it in float64 on the CPU.

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
        "A decomposition failed on %s (%s). It is repeated in float64 on the CPU, which takes longer and gives the same result. "
        "There is nothing to do, unless the layer is left out.",
        matrix.device,
        problem,
    )
    parts = tuple(decompose(matrix.double().cpu()))
    if not all(part.isfinite().all() for part in parts):
        raise torch.linalg.LinAlgError(problem)
    return tuple(part.to(matrix) for part in parts)


@dataclass(frozen=True)
class Subspace:
    """The projection onto a null space. It keeps a basis of the null space or of the core, whichever is smaller.

    Attributes:
        basis: orthonormal columns, (G, d, k). Columns that do not belong to a group are zero.
        spans_null: whether the basis spans the null space. Otherwise it spans the core.
        null_dim: dimension of the null space, summed over groups.
        dim: d, summed over groups.
        num_rows: number of rows from which it was computed.
        captured: share of the rows' energy (sum of squares) in the core: 1 at tau = 1, otherwise at least tau.
    """

    basis: Tensor
    spans_null: bool
    null_dim: int
    dim: int
    num_rows: int
    captured: float = 1.0

    def project(self, matrix: Tensor) -> Tensor:
        """`M P` for M (G, o, d): the part of M in the null space. Zeros if that part is no larger than M's rounding."""
        part = (matrix @ self.basis) @ self.basis.mT
        rest = part if self.spans_null else matrix - part
        share = rest.norm() / matrix.norm()
        # If little is left, it contains rounding errors of the large part that was subtracted. Project once more to remove them.
        if share < _LITTLE and not self.spans_null:
            rest = rest - (rest @ self.basis) @ self.basis.mT
            share = rest.norm() / matrix.norm()
        return rest if share > rank_tolerance(matrix.shape[-1], matrix.dtype) else torch.zeros_like(rest)


def core_dims(singular_values: Tensor, energy_threshold: float, tolerance: float) -> Tensor:
    """k for each group, (G,): the smallest number of leading values with a share tau of the energy, and at most the rank.

    Args:
        singular_values: (G, r), largest first.
        energy_threshold: tau in (0, 1]. At 1 the result is the numerical rank.
        tolerance: values up to `tolerance * largest` count as zero.
    """
    rank = (singular_values > tolerance * singular_values[..., :1]).sum(-1)
    if energy_threshold == 1:
        return rank
    energy = singular_values.square().cumsum(-1)
    reached = (energy < energy_threshold * energy[..., -1:]).sum(-1) + 1
    return torch.minimum(rank, reached)


def null_space(representation: Representation, energy_threshold: float, dtype: torch.dtype | None = None) -> Subspace:
    """The null space of the rows in a representation, at an energy threshold tau.

    Args:
        representation: rows of width d.
        energy_threshold: tau in (0, 1].
        dtype: the dtype of the basis. Default: the dtype of the rows, at least float32.

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
    # Only a full decomposition (found = width) contains null vectors.
    spans_null = found == width and width - smallest < largest
    kept = ~in_core if spans_null else in_core
    columns = slice(smallest, None) if spans_null else slice(largest)
    basis = (vectors * kept[:, None, :])[..., columns]
    null_dim = groups * width - int(dims.sum())
    energy = values.square()
    captured = float((energy * in_core).sum() / energy.sum()) if energy_threshold < 1 and energy.any() else 1.0
    return Subspace(basis.to(dtype).contiguous(), spans_null, null_dim, groups * width, representation.num_rows, captured)


def _of_full_rank(representation: Representation, dtype: torch.dtype) -> Subspace:
    """The null space at tau = 1 of rows with full rank. Any orthonormal basis of their span will do.

    None is needed if they span everything.
    """
    if representation.rows is None:
        gram = representation.square()
        groups, width, _ = gram.shape
        return Subspace(gram.new_zeros(groups, width, 0, dtype=dtype), True, 0, groups * width, representation.num_rows)
    groups, rank, width = representation.rows.shape
    basis, _ = converging(torch.linalg.qr, representation.rows.mT)
    return Subspace(basis.to(dtype).contiguous(), False, groups * (width - rank), groups * width, representation.num_rows)
