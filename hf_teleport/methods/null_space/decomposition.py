"""The null spaces of all layers, each found by one process from the rows that all of them saw.

A decomposition costs d³ and depends on no other, so the layers are spread over the processes, the longest first. What a process
knows of a layer goes to the layer's owner, who decomposes it and hands the basis back to all. Layers that read the same input, as
q, k and v do, share a representation, and so a decomposition and a basis.
"""

import logging
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_teleport.layers.subspace import Representation, Subspace, null_space
from hf_teleport.weights.ranks import Ranks

logger = logging.getLogger(__name__)

_K = TypeVar("_K")


def null_spaces(
    representations: dict[_K, Representation], dtypes: dict[_K, torch.dtype], energy_threshold: float, ranks: Ranks
) -> dict[_K, Subspace | None]:
    """The null space of each layer's rows; None where the decomposition fails.

    Args:
        representations: the rows of each layer on this process. Layers without rows may be absent. Layers with the same rows
            share one object.
        dtypes: the dtype of the weight, for each layer that may move. All processes must have the same order.
        energy_threshold: tau in (0, 1].
        ranks: the processes whose rows are one representation.

    Returns:
        A null space for each layer that has rows on any process.
    """
    sources = _sources(representations, dtypes, ranks)
    keys = [key for key, source in sources.items() if source == key]
    found = _of_each(keys, representations, dtypes, energy_threshold, ranks)
    return {key: found[source] for key, source in sources.items() if source in found}


def _sources(representations: dict[_K, Representation], dtypes: dict[_K, torch.dtype], ranks: Ranks) -> dict[_K, _K]:
    """For each layer the first one that saw the same as it did, in every process."""
    first: dict[object, int] = {}
    own = [
        first.setdefault((id(representations[key]), dtype), i) if key in representations else i
        for i, (key, dtype) in enumerate(dtypes.items())
    ]
    keys = list(dtypes)
    agreed = (each[0] if len(set(each)) == 1 else i for i, each in enumerate(zip(*ranks.gather(own), strict=True)))
    return dict(zip(keys, (keys[i] for i in agreed), strict=True))


def _of_each(
    keys: list[_K],
    representations: dict[_K, Representation],
    dtypes: dict[_K, torch.dtype],
    energy_threshold: float,
    ranks: Ranks,
) -> dict[_K, Subspace | None]:
    if ranks.size == 1:
        return {key: _found(representations[key], energy_threshold, dtypes[key]) for key in keys if key in representations}
    known = [representations.get(key) for key in keys]
    shares = list(zip(*ranks.gather([_Share.of(own) for own in known]), strict=True))
    seen = [i for i, each in enumerate(shares) if any(share.num_rows for share in each)]
    owners = dict(zip(seen, ranks.spread([_cost(shares[i]) for i in seen]), strict=True))
    gathered = {i: _gathered(known[i], shares[i], owners[i], ranks) for i in seen}
    own_work = {i: whole for i, whole in gathered.items() if whole is not None}
    subspaces = ranks.together(lambda: {i: _found(whole, energy_threshold, dtypes[keys[i]]) for i, whole in own_work.items()})
    # First send the shapes of the bases, so that the other processes can allocate memory. Then send the bases one by one.
    outlines = ranks.gather({i: s and replace(s, basis=torch.empty_like(s.basis, device="meta")) for i, s in subspaces.items()})
    found: dict[_K, Subspace | None] = {}
    for i in seen:
        outline = outlines[owners[i]][i]
        if outline is not None:
            own = subspaces.get(i)
            basis = torch.empty_like(outline.basis, device=ranks.device) if own is None else own.basis
            ranks.broadcast([basis], source=owners[i])
            outline = replace(outline, basis=basis)
        found[keys[i]] = outline
    return found


@dataclass(frozen=True)
class _Share:
    """How much one process knows of a layer."""

    num_rows: int = 0
    shape: tuple[int, ...] = ()
    is_gram: bool = False
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(own: Representation | None) -> "_Share":
        kept = None if own is None else own.rows if own.gram is None else own.gram
        if own is None or kept is None:
            return _Share()
        return _Share(own.num_rows, tuple(kept.shape), own.gram is not None, own.dtype)


def _cost(shares: tuple[_Share, ...]) -> float:
    """In multiplications, to a factor: d³ for a Gram matrix, N² d for N < d rows."""
    groups, _, width = next(share.shape for share in shares if share.num_rows)
    rows = sum(share.shape[1] for share in shares if share.num_rows)
    return groups * width * min(rows, width) ** 2


def _gathered(own: Representation | None, shares: tuple[_Share, ...], owner: int, ranks: Ranks) -> Representation | None:
    """All processes' rows of one layer, for its owner; None for the others."""
    first = next(share for share in shares if share.num_rows)
    whole = Representation()
    whole.dtype, whole.num_rows = first.dtype, sum(share.num_rows for share in shares)
    if any(share.is_gram for share in shares):
        groups, _, width = first.shape
        whole.gram = torch.zeros(groups, width, width, dtype=torch.float64, device=ranks.device)
        if own is not None and own.num_rows:
            whole.gram += own.square()
        dist.reduce(whole.gram, owner)
    else:
        for source, share in enumerate(shares):
            if share.num_rows and ranks.rank in (source, owner):
                rows = _sent(own, share, source, owner, ranks)
                if ranks.rank == owner:
                    whole.keep(rows)
    return whole if ranks.rank == owner else None


def _sent(own: Representation | None, share: _Share, source: int, owner: int, ranks: Ranks) -> Tensor:
    """The rows that the source kept, at the source and at the owner."""
    if ranks.rank == source and own is not None and own.rows is not None:
        rows = own.rows.contiguous()
        if source != owner:
            dist.send(rows, owner)
        return rows
    rows = torch.empty(share.shape, dtype=torch.float64, device=ranks.device)
    dist.recv(rows, source)
    return rows


def _found(representation: Representation, energy_threshold: float, dtype: torch.dtype) -> Subspace | None:
    try:
        return null_space(representation, energy_threshold, dtype)
    except torch.linalg.LinAlgError as error:
        logger.warning(
            "A layer is left out of this teleport, because its inputs could not be decomposed (%s); the others move. If it is so "
            "in every teleport, see whether its inputs are finite, or name it in exclude_modules.",
            error,
        )
        return None
