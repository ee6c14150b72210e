"""The smallest turn that makes a second moment diagonal.

Eigenvectors come in any order and with either sign, and where eigenvalues are equal any rotation of them is as good. The
optimizer's averages follow a small turn better than a large one, so the turn is chosen that leaves each coordinate nearest to
where it is.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_teleport.layers.subspace import converging

# Moments are sums in float32.
_ROUNDING = torch.finfo(torch.float32).eps


def smallest_turn(moment: Tensor, tolerance: float = _ROUNDING) -> Tensor:
    """For symmetric matrices (H, k, k) orthogonal ones whose rows are the eigenvectors, each in its nearest coordinate's place.

    Args:
        tolerance: eigenvalues are taken to be equal that differ by no more than this times k times the largest one. Their
            coordinates are turned among themselves as little as can be (a Procrustes problem).

    Raises:
        torch.linalg.LinAlgError: the decomposition does not converge.
    """
    values, vectors = converging(torch.linalg.eigh, moment)
    return torch.stack([_placed(*pair, tolerance * moment.shape[-1]) for pair in zip(values, vectors.mT, strict=True)])


def mean_angle(matrices: Tensor) -> float:
    """How far orthogonal matrices (H, k, k) turn the coordinates: the mean angle to where each was, in degrees."""
    return float(torch.rad2deg(matrices.diagonal(dim1=-2, dim2=-1).clamp(-1, 1).acos().mean()))


def _placed(values: Tensor, rows: Tensor, tolerance: float) -> Tensor:
    """Eigenvectors (k, k), rows in ascending order of their eigenvalues, in the places of coordinates."""
    _, places = linear_sum_assignment(rows.square().cpu().numpy(), maximize=True)
    place = torch.as_tensor(places, device=rows.device)
    placed = torch.empty_like(rows)
    placed[place] = rows
    placed = placed * torch.where(placed.diagonal() < 0, -1.0, 1.0).to(placed)[:, None]
    for first, last in _equal(values.tolist(), tolerance):
        own = place[first:last]
        left, _, right = torch.linalg.svd(rows[first:last, own].mT)
        placed[own] = left @ right @ rows[first:last]
    return placed


def _equal(ascending: list[float], tolerance: float) -> list[tuple[int, int]]:
    """Ranges of two or more eigenvalues that are equal, from the largest down."""
    limit, ranges, last = tolerance * max(map(abs, ascending)), [], len(ascending)
    while last > 0:
        first = last - 1
        while first > 0 and ascending[last - 1] - ascending[first - 1] <= limit:
            first -= 1
        if last - first > 1:
            ranges.append((first, last))
        last = first
    return ranges
