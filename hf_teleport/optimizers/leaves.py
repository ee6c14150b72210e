"""The tensors that an optimizer keeps for a weight, each by its place in the state, read and written as plain numbers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_teleport.optimizers.parts import is_count
from hf_teleport.weights.copies import is_wrapper

# As bitsandbytes names its quantised averages, and what belongs to each: its scales, and the values of its codes.
_CODES = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
_BLOCK = 256


@dataclass
class Leaf:
    """A tensor with coordinates in the state of a parameter.

    Attributes:
        path: its name in the state, after the names of the containers around it.
        tensor: the tensor in the state.
        scales, values: for a tensor of bitsandbytes' codes, the largest magnitude of each block, and the value of each code.
    """

    path: str
    tensor: Tensor
    scales: Tensor | None = None
    values: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def readable(self) -> bool:
        """Whether it consists of numbers, or of codes that are known."""
        if is_wrapper(self.tensor):
            return hasattr(self.tensor, "dequantize") and hasattr(self.tensor, "block_size")
        return self.scales is not None or (self.tensor.is_floating_point() and not self.tensor.is_sparse)

    def read(self) -> Tensor:
        """The numbers; the kept tensor itself if it is one of numbers."""
        if is_wrapper(self.tensor):
            return self.tensor.dequantize().to(torch.float32)
        if self.scales is None or self.values is None:
            return self.tensor
        numbers = self.values[_blocks(self.tensor, self.scales).long()] * self.scales[..., None]
        return numbers.flatten(-2)[..., : self.tensor.numel() // self._rows].reshape(self.shape)

    @property
    def _rows(self) -> int:
        """How many averages of the weight's size there are: AdEMAMix keeps two as one."""
        return 1 if self.scales is None else self.scales.shape[:-1].numel()

    def write(self, numbers: Tensor) -> None:
        """Keep these numbers, quantised as before."""
        if numbers is self.tensor:
            return
        if self.scales is None or self.values is None:
            self.tensor.copy_(numbers)
            return
        blocks = _blocks(numbers, self.scales)
        self.scales.copy_(blocks.abs().amax(-1))
        relative = blocks / self.scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        values, codes = self.values.sort()
        nearest = codes[torch.bucketize(relative, (values[1:] + values[:-1]) / 2)].to(self.tensor.dtype)
        self.tensor.copy_(nearest.flatten(-2)[..., : numbers.numel() // self._rows].reshape(self.shape))


def _blocks(tensor: Tensor, scales: Tensor) -> Tensor:
    """A tensor in blocks of those elements that share a scale, (*scales, 256), filled up with zeros."""
    rows = tensor.reshape(*scales.shape[:-1], -1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _BLOCK))
    return padded.view(*scales.shape, _BLOCK)


def leaves(state: dict[str, Any]) -> dict[str, Leaf]:
    """The tensors with coordinates in a parameter's state, by their paths; counts and flags are none."""
    codes = {name: (state[scales], state[values]) for name, (scales, values) in _CODES.items() if scales in state}
    beside = {each for name in codes for each in _CODES[name]}
    found = {}
    for name, value in state.items():
        if name in codes:
            found[name] = Leaf(name, value, *codes[name])
        elif name not in beside:
            found.update({leaf.path: leaf for leaf in _leaves_in(str(name), value)})
    return found


def _leaves_in(path: str, value: Any) -> Iterator[Leaf]:
    if is_count(value):
        return
    if isinstance(value, Tensor):
        if value.numel():
            yield Leaf(path, value)
        return
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    elif hasattr(value, "__dict__"):
        inner = vars(value).items()
    for name, each in inner:
        yield from _leaves_in(f"{path}.{name}", each)


def opaque(state: dict[str, Any]) -> list[str]:
    """The names of what is kept that can't be looked into, such as queues and compiled objects."""
    return [str(name) for name, value in state.items() if _hidden(value)]


def _hidden(value: Any) -> bool:
    if is_count(value) or isinstance(value, Tensor):
        return False
    if isinstance(value, dict):
        return any(map(_hidden, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_hidden, value))
    return not hasattr(value, "__dict__") or any(map(_hidden, vars(value).values()))
