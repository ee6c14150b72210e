"""Whether gradients turned as their weights did: a symmetry turns both alike."""

import math
from itertools import islice

import torch
from torch import Tensor, nn

from hf_teleport.layers.point import Point
from hf_teleport.methods.base import TurningMethod
from hf_teleport.methods.basis.turn import Turn
from hf_teleport.weights.norms import norm
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.snapshot import Snapshot
from hf_teleport.weights.whole import Weights

# Relative difference up to which a gradient after a turn is the turned gradient from before, by the precision of the weights.
_AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-5}
# A turn rounds each weight as a sum of products, and the forward's sums are taken in another order.
ROUNDINGS = 10


def unturned(
    turn: Turn, before: dict[nn.Parameter, Tensor], after: dict[nn.Parameter, Tensor], weights: Weights, ranks: Ranks
) -> dict[nn.Parameter, tuple[float, float]]:
    """The gradients after a turn that are not the turned ones from before.

    Args:
        before, after: gradients, each of its parameter's shape, or of this rank's shard of it.

    Returns:
        For each its distance from the turned one, and the length to judge that by.
    """

    def lengths() -> dict[nn.Parameter, list[float]]:
        expected = turn.turned(before, weights)
        return {p: [norm([gradient]), norm([after[p] - gradient if p in after else gradient])] for p, gradient in expected}

    off, each = {}, _joined(ranks.together(lengths), weights)
    total = math.hypot(*(length for length, _ in each.values()))
    for parameter, (length, distance) in each.items():
        size = length + 1e-3 * total
        if not distance <= _AGREEMENT[parameter.dtype] * size:
            off[parameter] = distance, size
    return off


@torch.no_grad()
def rounding(method: TurningMethod, point: Point) -> dict[nn.Parameter, float]:
    """How far each gradient moves if every weight that turned is off by its last digit: a tiny one moves far."""
    seed = method.config.seed
    generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in method.movable}
    kept = Snapshot(method.movable)
    try:
        for parameter in method.in_order():
            signs = torch.randint(0, 2, parameter.shape, generator=generators[parameter.device], device=parameter.device)
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * (2 * signs - 1))
        with torch.enable_grad():
            moved = method.evaluate(point.batch, point.seed).by_parameter
    finally:
        kept.restore()
    gradients = {p: gradient for p, gradient in point.by_parameter.items() if p in moved}
    lengths = method.ranks.together(lambda: {p: [norm([moved[p] - gradient])] for p, gradient in gradients.items()})
    return {parameter: length for parameter, (length,) in _joined(lengths, method.weights).items()}


def _joined(lengths: dict[nn.Parameter, list[float]], weights: Weights) -> dict[nn.Parameter, list[float]]:
    """The lengths of whole tensors, from the lengths of this rank's shards."""
    joined = iter(weights.joined([length for each in lengths.values() for length in each]))
    return {parameter: list(islice(joined, len(each))) for parameter, each in lengths.items()}
