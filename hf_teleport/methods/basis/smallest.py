"""The smallest turn that makes a second moment diagonal.

Eigenvectors come in any order and with either sign, and where eigenvalues are equal any rotation of them is as good. The
optimizer's averages follow a small turn better than a large one, so the turn is chosen that leaves each coordinate nearest to
where it is.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_teleport.layers.subspace import converging


def smallest_turn(moment: Tensor, noise: float = 0.0) -> Tensor:
    """For symmetric matrices (H, k, k) orthogonal ones whose rows are the eigenvectors, each in its nearest coordinate's place.

    Args:
        noise: eigenvalues whose relative difference is at most this are taken to be equal: their eigenvectors are not known, and
            their coordinates are turned among themselves as little as can be (a Procrustes problem).

    Raises:
        torch.linalg.LinAlgError: the decomposition does not converge.
    """
    values, vectors = converging(torch.linalg.eigh, moment)
    return torch.stack([_placed(*pair, noise) for pair in zip(values, vectors.mT, strict=True)])


def _placed(values: Tensor, rows: Tensor, noise: float) -> Tensor:
    """Eigenvectors (k, k), rows in ascending order of their eigenvalues, in the places of coordinates."""
    _, places = linear_sum_assignment(rows.square().cpu().numpy(), maximize=True)
    place = torch.as_tensor(places, device=rows.device)
    placed = torch.empty_like(rows)
    placed[place] = rows
    placed = placed * torch.where(placed.diagonal() < 0, -1.0, 1.0).to(placed)[:, None]
    for first, last in _equal(values, noise):
        own = place[first:last]
        left, _, right = torch.linalg.svd(rows[first:last, own].mT)
        placed[own] = left @ right @ rows[first:last]
    return placed


def _equal(values: Tensor, noise: float) -> list[tuple[int, int]]:
    """Ranges of ascending eigenvalues that are equal to within the noise, from the largest down."""
    ascending, ranges, last = values.tolist(), [], len(values)
    while last > 0 and noise > 0:
        first = last - 1
        while first > 0 and ascending[first - 1] >= ascending[last - 1] * (1 - noise):
            first -= 1
        if last - first > 1:
            ranges.append((first, last))
        last = first
    return ranges
