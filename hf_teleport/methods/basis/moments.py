"""Second moments of gradients along the features of each symmetry: what a basis is chosen from."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.symmetry import Part, Symmetry, folds_of
from hf_teleport.methods.basis.turn import reciprocals, slices
from hf_teleport.optimizers.state import laid_along
from hf_teleport.weights.shards import own_rows

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
    def look(self, gradients: Mapping[nn.Parameter, Any], vote: Callable[[], None] = lambda: None) -> None:
        """Add the gradients of a step. A step with a gradient that is not finite changes nothing.

        Args:
            gradients: for each parameter a tensor of its shape. Of one that FSDP2 shards each rank adds up its part, and the sums
                (H, k, k) are added up over the ranks.
            vote: called before each message between ranks.
        """
        factors, mesh = _folded_gains(self.symmetries), _mesh_of(gradients.values())

        def summed(share: Tensor) -> Tensor:
            if mesh is not None:
                vote()
                dist.all_reduce(share, group=mesh.get_group())
            return share

        for symmetry in self.symmetries:
            parts = [part for part in symmetry.parts if part.parameter in gradients]
            seen = [_Seen(gradients[part.parameter], part, factors[part.parameter], mesh, vote) for part in parts]
            if not seen:
                continue
            # What each rank has of a moment is divided by the trace of all of it.
            traces = None if mesh is None else summed(torch.stack([each.trace() for each in seen]))
            new, finite = torch.zeros(()), []
            for i, each in enumerate(seen):
                moment = each.moment()
                trace = (moment.diagonal(dim1=-2, dim2=-1).sum(-1) if traces is None else traces[i])[:, None, None]
                new = new.to(moment) + torch.where(trace > 0, moment / trace, 0)
                finite.append(trace.isfinite().all())
            new = summed(new)
            known = self.values.setdefault(symmetry, torch.zeros_like(new))
            # Without a look at the numbers: on a GPU that would make training wait.
            known.copy_(torch.where(torch.stack(finite).all(), self.decay * known + new, known))
        self.looks += 1


def turned(moment: Tensor, matrices: Tensor) -> Tensor:
    """A second moment (H, k, k) in the basis whose coordinates are the rows of `matrices`, (H, k, k)."""
    wide = torch.promote_types(moment.dtype, matrices.dtype)
    own = matrices.to(moment.device, wide)
    return (own @ moment.to(wide) @ own.mT).to(moment.dtype)


def misalignment(moment: Tensor) -> float:
    """The share of a second moment's squares that lies off the diagonal, over all blocks (H, k, k)."""
    total = moment.square().sum()
    off_diagonal = 1 - moment.diagonal(dim1=-2, dim2=-1).square().sum() / total
    # Rounding makes the share of a diagonal matrix a little less than zero.
    return float(off_diagonal.clamp_min(0.0)) if total > 0 else 0.0


# How much of every share is the same for all coordinates.
_EQUAL = 0.02


def shares(squares: Tensor) -> Tensor:
    """The share of each coordinate in its block's squared gradients, (H, k), above zero.

    A fiftieth is spread evenly. A few gradients of low rank, as LoRA has, show nothing of most directions. With a second moment
    of zero there, Adam's next steps would be many times the learning rate.

    Args:
        squares: sums of squared gradients, (H, k). A block that has none gets equal shares.
    """
    squares = squares.clamp_min(torch.finfo(squares.dtype).tiny)
    return (1 - _EQUAL) * squares / squares.sum(-1, keepdim=True) + _EQUAL / squares.shape[-1]


class _Seen:
    """One part's gradient, and how it lies.

    Args:
        gradient: a tensor, or a sharded one.
        factors: what folding the gains multiplies it with.
        mesh: the ranks over which the rows of all sharded gradients are dealt out; None: they lie in another way, or whole.
        vote: called before each message.
    """

    def __init__(self, gradient: Any, part: Part, factors: list[tuple[int, Tensor]], mesh: Any, vote: Callable[[], None]):
        self._gradient, self._part, self._factors, self._mesh, self._vote = gradient, part, factors, mesh, vote

    def trace(self) -> Tensor:
        """This rank's part of the trace of each block, (H,), from its rows."""
        if not isinstance(self._gradient, DTensor):
            return self.moment().diagonal(dim1=-2, dim2=-1).sum(-1)
        dim = self._part.dim
        squares = self._folded(self._gradient.to_local(), 0).square()
        sums = squares.movedim(dim, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
        if dim == 0:
            rows = self._own(torch.arange(self._gradient.shape[0], device=sums.device))
            sums = sums.new_zeros(self._gradient.shape[0]).index_copy(0, rows, sums)
        return sums[self._part.positions.to(sums.device)].sum((1, 2))

    def moment(self) -> Tensor:
        """What this rank has of `G Gᵀ`, (H, k, k), summed over the part's copies."""
        gradient, spread = self._gradient, None
        if isinstance(gradient, DTensor):
            if self._mesh is not None and gradient.dim() > 1:
                # A rank needs all of the turned axis, and has a part of another one.
                spread = int(self._part.dim == 0)
            if spread != 0:
                self._vote()
            target = Replicate() if spread is None else Split(spread)
            gradient = gradient.redistribute(placements=[target] * gradient.device_mesh.ndim).to_local()
        rows = slices(self._folded(gradient, spread), self._part).transpose(1, 2).flatten(2)
        moment = rows @ rows.mT
        # What every rank has whole counts once.
        counts = self._mesh is None or spread is not None or self._mesh.get_local_rank() == 0
        return moment if counts else torch.zeros_like(moment)

    def _folded(self, gradient: Tensor, spread: int | None) -> Tensor:
        """The gradient after folding the gains.

        Args:
            spread: the axis that is sharded. None: this rank has the whole gradient.
        """
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        for dim, along in self._factors:
            own = self._own(along) if dim == spread else along
            gradient = gradient * laid_along(own, dim, gradient)
        return gradient

    def _own(self, whole: Tensor) -> Tensor:
        return own_rows(whole, self._mesh.size(), self._mesh.get_local_rank())


def _folded_gains(symmetries: Iterable[Symmetry]) -> Factors:
    """What folding all gains does to gradients: `W' = W diag(g)` has `G diag(1/g)`, and a norm's bias `b / g` has `G g`."""
    return reciprocals({fold: _whole(effective(fold.norm)) for fold in folds_of(symmetries)})


def _mesh_of(gradients: Iterable[Any]) -> Any:
    """The ranks over which FSDP2 deals out the rows of all gradients; None if they lie in another way."""
    meshes = {g.device_mesh if tuple(g.placements) == (Split(0),) else None for g in gradients if isinstance(g, DTensor)}
    return meshes.pop() if len(meshes) == 1 else None


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
