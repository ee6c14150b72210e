"""What every layer has read on the teleport batches, and the null spaces of that."""

import copy

import torch
from torch import Tensor

from hf_teleport.layers.layer import Layer
from hf_teleport.layers.point import Point
from hf_teleport.layers.subspace import Representation, Subspace
from hf_teleport.methods.null_space.decomposition import null_spaces
from hf_teleport.weights.ranks import Ranks


class Inputs:
    """The inputs of layers, batch by batch. Layers that have read the same so far share a representation, until they part.

    Args:
        ranks: the processes that each have a share of every batch.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._representations: dict[Layer, Representation] = {}

    def add(self, layers: list[Layer], point: Point) -> None:
        """The inputs of the point's batch."""
        before, shared = dict(self._representations), {}
        for layer in layers:
            uses = point.trace.uses.get(layer.weight, {}).get(layer.region, [])
            if not uses:
                continue
            known = before.get(layer)
            same = (id(known), layer.reads(uses))
            if same not in shared:
                shared[same] = Representation() if known is None else copy.copy(known)
                layer.represent(uses, shared[same])
            self._representations[layer] = shared[same]

    def null_spaces(self, layers: list[Layer], energy_threshold: float) -> dict[Layer, Subspace | None]:
        """The null space of each layer that has rows on any process. None: the decomposition failed."""
        dtypes = {layer: layer.weight.dtype for layer in layers}
        return null_spaces(self._representations, dtypes, energy_threshold, self._ranks)

    def forget(self) -> None:
        """Let the inputs go."""
        self._representations = {}


def random_move(subspaces: dict[Layer, Subspace], seed: int) -> dict[Layer, Tensor]:
    """A random direction in each layer's null space, (G, o, d or d + 1), normally distributed there."""
    generator = torch.Generator().manual_seed(seed)
    moves = {}
    for layer, subspace in subspaces.items():
        moves[layer] = subspace.project(torch.randn(layer.shape, generator=generator).to(layer.weight))
    return moves
