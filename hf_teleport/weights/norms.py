"""Euclidean norms of lists of tensors."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Norms between these bounds need no float64.
_SMALLEST_NORM, _LARGEST_NORM = 1e-14, 1e18


def norm(tensors: Iterable[Tensor | None]) -> float:
    """Euclidean norm of all numbers in a list of tensors."""
    return math.hypot(*norms(t for t in tensors if t is not None))


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """The norm of each tensor."""
    present = [t.detach() for t in tensors]
    own = [norm_of(t) for t in present]
    found = torch.stack([n.to(own[0].device) for n in own]).tolist() if own else []
    # Outside the bounds, squares underflow or overflow in float32.
    inside = [_SMALLEST_NORM < n < _LARGEST_NORM or not t.any() for n, t in zip(found, present, strict=True)]
    return [n if fits else wide_norm(t) for n, fits, t in zip(found, inside, present, strict=True)]


def wide_norm(tensor: Tensor) -> float:
    """Euclidean norm, computed in float64."""
    return float(norm_of(tensor.to(torch.promote_types(tensor.dtype, torch.float64))))


def norm_of(tensor: Tensor) -> Tensor:
    """Euclidean norm, as a float64 scalar. Rows are reduced in their own precision, which is fast, and then joined in float64."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = torch.linalg.vector_norm(real, dim=-1, dtype=torch.promote_types(real.dtype, torch.float32)) if real.dim() else real
    return torch.linalg.vector_norm(rows, dtype=torch.float64)
