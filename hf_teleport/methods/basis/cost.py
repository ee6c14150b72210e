"""What a change of basis takes: decompositions, and which process makes which; the turn; looking at gradients; memory."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.moments import Moments
from hf_teleport.methods.basis.smallest import smallest_turn
from hf_teleport.methods.basis.symmetry import Symmetry
from hf_teleport.methods.basis.turn import Turn
from hf_teleport.weights.ranks import spread
from hf_teleport.weights.whole import Weights

# A larger matrix is judged by one of this size: from here on the time goes with the third power (docs/performance.md).
_TRIED = 512


class Blocks(Protocol):
    """A symmetry, or the report of one."""

    kind: str
    name: str
    blocks: int
    size: int


@dataclass(frozen=True)
class Decomposition:
    """The eigenvectors of the blocks of one symmetry. One process finds them, on its device, and sends them to the others.

    Attributes:
        symmetry: whose.
        process: the number of the process.
        seconds: about.
    """

    symmetry: Blocks
    process: int
    seconds: float


def work(symmetry: Blocks) -> float:
    """What the decompositions of a symmetry's blocks take, in an unknown unit. Factors (size 1) are no decompositions."""
    return float(symmetry.blocks * symmetry.size**3) if symmetry.kind != "scaling" else 0.0


def decompositions(symmetries: Iterable[Blocks], processes: int, device: torch.device) -> list[Decomposition]:
    """Who decomposes what in an event: each symmetry in turn, the longest first, goes to the process with the least to do.

    A matrix of each size, or of 512, is decomposed once to see how long it takes.

    Args:
        symmetries: those that will be turned.
        device: where the weights are, and so the second moments.
    """
    listed = list(symmetries)
    owners = spread([work(symmetry) for symmetry in listed], processes)
    each = {size: _seconds(size, device) for size in {s.size for s in listed if work(s)}}
    return [
        Decomposition(symmetry, owner, symmetry.blocks * each[symmetry.size] if work(symmetry) else 0.0)
        for symmetry, owner in zip(listed, owners, strict=True)
    ]


def longest(planned: Iterable[Decomposition]) -> float:
    """The seconds of the process that has the most to do: all others wait for it."""
    loads: dict[int, float] = {}
    for each in planned:
        loads[each.process] = loads.get(each.process, 0.0) + each.seconds
    return max(loads.values(), default=0.0)


def unmoved(symmetries: Iterable[Symmetry], like: Tensor) -> Turn:
    """A turn by matrices that change nothing, of a tensor's type and device."""
    return Turn({s: torch.eye(s.size).to(like).expand(s.blocks, -1, -1) for s in symmetries if s.kind != "scaling"})


def turn_seconds(turn: Turn, gradients: Mapping[nn.Parameter, Tensor], weights: Weights) -> float:
    """Of turning one tensor for each weight, measured on its gradient, which is laid out as `weights`."""
    start = time.perf_counter()
    _wait(turned for _, turned in turn.turned(dict(gradients), weights))
    return time.perf_counter() - start


def look_seconds(symmetries: Iterable[Symmetry], gradients: Mapping[nn.Parameter, Any], vote: Callable[[], None]) -> float:
    """Of adding the second moments of one step's gradients, as `Moments.look` takes them."""
    moments = Moments(symmetries)
    start = time.perf_counter()
    moments.look(gradients, vote)
    _wait(moments.values.values())
    return time.perf_counter() - start


def moment_bytes(symmetries: Iterable[Symmetry]) -> int:
    """Of the second moments in an event: before and after in float32, and with the matrices in float64; and of the largest
    decomposition.
    """
    listed = list(symmetries)
    return sum(16 * s.blocks * s.size**2 for s in listed) + max((24 * s.size**2 for s in listed), default=0)


def _wait(tensors: Iterable[Tensor]) -> None:
    """Until the device has computed all of them: it does so in turn."""
    for tensor in list(tensors)[-1:]:
        tensor.flatten()[:1].sum().item()


def _seconds(size: int, device: torch.device) -> float:
    """Of the smallest turn for one matrix."""
    tried = min(size, _TRIED)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tried, 2 * tried, dtype=torch.float64, generator=generator)
    moment = (rows @ rows.mT).to(device)[None]
    start = time.perf_counter()
    smallest_turn(moment)  # the matching waits for the device
    return (time.perf_counter() - start) * (size / tried) ** 3
