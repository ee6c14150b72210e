"""Second moments of gradients along the features of each symmetry: what a basis is chosen from."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.symmetry import Part, Symmetry
from hf_teleport.methods.basis.turn import slices

Factors = dict[nn.Parameter, list[tuple[int, Tensor]]]
"""For each parameter the axes along which its gradient is multiplied, and the factors."""


class Moments:
    """For each symmetry a sum over steps and weights of `G Gᵀ / tr(G Gᵀ)`, G being a gradient with all gains folded.

    Each weight counts alike, whatever the scale of its gradient. So gradients may be clipped, or scaled by any number.

    Args:
        symmetries: the symmetries to look at.
        decay: how much of `C` is left when another step is added, `C <- decay * C + m`; 1: all of it.

    Attributes:
        values: C for each symmetry, (H, k, k).
        looks: how many steps were added.
    """

    def __init__(self, symmetries: Iterable[Symmetry], decay: float = 1.0):
        self.symmetries = list(symmetries)
        self.decay = decay
        self.values: dict[Symmetry, Tensor] = {}
        self.looks = 0

    @torch.no_grad()
    def look(self, gradients: Mapping[nn.Parameter, Any]) -> None:
        """Add the gradients of a step. A step with a gradient that is not finite changes nothing.

        Args:
            gradients: for each parameter a tensor of its shape. One that FSDP2 shards counts with the shards of all ranks.
        """
        factors = _folded_gains(self.symmetries)
        for symmetry in self.symmetries:
            seen = [_moment(gradients[p.parameter], p, factors[p.parameter]) for p in symmetry.parts if p.parameter in gradients]
            if not seen:
                continue
            traces = [moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for moment in seen]
            new = sum(
                (torch.where(t > 0, m / t, 0) for m, t in zip(seen[1:], traces[1:], strict=True)),
                torch.where(traces[0] > 0, seen[0] / traces[0], 0),
            )
            known = self.values.setdefault(symmetry, torch.zeros_like(new))
            # Without a look at the numbers: on a GPU that would make training wait.
            finite = torch.stack([trace.isfinite().all() for trace in traces]).all()
            known.copy_(torch.where(finite, self.decay * known + new, known))
        self.looks += 1


def turned(moment: Tensor, matrices: Tensor) -> Tensor:
    """A second moment (H, k, k) in the basis whose coordinates are the rows of `matrices`, (H, k, k)."""
    wide = torch.promote_types(moment.dtype, matrices.dtype)
    own = matrices.to(moment.device, wide)
    return (own @ moment.to(wide) @ own.mT).to(moment.dtype)


def misalignment(moment: Tensor) -> float:
    """The share of a second moment's squares that lies off the diagonal, over all blocks (H, k, k)."""
    total = moment.square().sum()
    return float(1 - moment.diagonal(dim1=-2, dim2=-1).square().sum() / total) if total > 0 else 0.0


def shares(moment: Tensor) -> Tensor:
    """The share of each coordinate in a second moment's trace, (H, k), above zero."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(moment.dtype).tiny)
    return diagonal / diagonal.sum(-1, keepdim=True)


def _folded_gains(symmetries: Iterable[Symmetry]) -> Factors:
    """What folding all gains does to gradients: `W' = W diag(g)` has `G diag(1/g)`, and a norm's bias `b / g` has `G g`."""
    factors: Factors = defaultdict(list)
    for fold in {fold.norm.gain: fold for symmetry in symmetries for fold in symmetry.folds}.values():
        gain = _whole(effective(fold.norm))
        for parameter, dim, elements in fold.readers:
            factors[parameter].append((dim, 1 / gain[elements.to(gain.device)]))
        if fold.norm.bias is not None:
            factors[fold.norm.bias].append((0, gain))
    return factors


def _moment(gradient: Any, part: Part, factors: list[tuple[int, Tensor]]) -> Tensor:
    """`G Gᵀ` (H, k, k) of a part, summed over its copies."""
    mesh = None
    if isinstance(gradient, DTensor):
        # The rows of the first axis are spread over the ranks. Along another axis each rank adds up what it has.
        spread = part.dim != 0 and tuple(gradient.placements) == (Split(0),)
        mesh = gradient.device_mesh if spread else None
        gradient = gradient.to_local() if spread else _whole(gradient)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    for dim, along in factors:
        own = along if mesh is None or dim != 0 else _own_rows(along, mesh.size(), mesh.get_local_rank())
        gradient = gradient * own.to(gradient).reshape([-1 if d == dim else 1 for d in range(gradient.dim())])
    rows = slices(gradient, part).transpose(1, 2).flatten(2)
    moment = rows @ rows.mT
    if mesh is not None:
        dist.all_reduce(moment, group=mesh.get_group())
    return moment


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own_rows(factors: Tensor, size: int, rank: int) -> Tensor:
    """This rank's part, as FSDP2 shares out rows."""
    parts = factors.chunk(size)
    return parts[rank] if rank < len(parts) else factors[:0]
