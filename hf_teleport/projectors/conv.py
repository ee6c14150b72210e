"""Convolutions in one, two and three dimensions: rows are the patches that the kernel sees (im2col).

With a padding mode other than zeros the modules call `F.pad` before they convolve. The operation followed here sees the padded
input, so every padding mode is right without a case of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from hf_teleport.projectors.base import Call, Projector, register

_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@register(F.conv1d, F.conv2d, F.conv3d)
@dataclass(frozen=True)
class Conv(Projector):
    """`F.conv1d/2d/3d`, weight (channels out, channels in / groups, *kernel); N = samples x positions.

    A depthwise convolution is the case of as many groups as channels: each channel has its own small null space.
    """

    role: ClassVar[str] = "conv"

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before and after each dimension, last dimension first, as F.pad takes it
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def bind(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call | None:
        kernel = tuple(weight.shape[2:])
        dims = len(kernel)
        stride, dilation = _per_dim(stride, dims), _per_dim(dilation, dims)
        reach = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        if padding == "same":
            sides = [(total // 2, total - total // 2) for total in reach]
        else:
            sides = [(p, p) for p in _per_dim(0 if padding == "valid" else padding, dims)]
        flat = tuple(p for side in reversed(sides) for p in side)
        return Call(cls(kernel, stride, flat, dilation, groups), input, weight, bias)

    def _padded(self, input: Tensor) -> Tensor:
        batched = input if input.dim() == len(self.kernel) + 2 else input.unsqueeze(0)
        return F.pad(batched, self.padding) if any(self.padding) else batched

    def rows(self, input: Tensor) -> Tensor:
        patches = self._padded(input)
        dims = len(self.kernel)
        for i, (size, step, spread) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            patches = patches.unfold(2 + i, spread * (size - 1) + 1, step)[..., ::spread]
        # (batch, groups, channels, *positions, *kernel) -> (groups, batch * positions, channels * kernel)
        patches = patches.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
        return patches.flatten(2 + dims).flatten(1, 1 + dims)

    def output_rows(self, output: Tensor) -> Tensor:
        batched = output if output.dim() == len(self.kernel) + 2 else output.unsqueeze(0)
        return batched.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).flatten(2)

    def weight_gradient(self, input: Tensor, output_gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
        # Use the library's own kernel. Patches overlap, and as rows they would take prod(kernel) times the memory.
        batched = output_gradient if output_gradient.dim() == len(self.kernel) + 2 else output_gradient.unsqueeze(0)
        gradient = _WEIGHT_GRADIENTS[len(self.kernel)](
            self._padded(input),
            torch.Size(shape),
            batched,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )
        return self.to_matrix(gradient)


@register(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
@dataclass(frozen=True)
class TransposedConv(Projector):
    """`F.conv_transpose1d/2d/3d`, weight (channels in, channels out / groups, *kernel); N = samples x input positions.

    Each input position is multiplied to a whole patch, and the patches are added up where they overlap. So Z here is those
    patches, and D are the patches of the output's gradient. A bias is added after that and is no part of it.
    """

    role: ClassVar[str] = "conv"

    forward: Conv  # the convolution that this one transposes; its patches are the rows

    @classmethod
    def bind(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Call | None:
        dims = weight.dim() - 2
        stride = _per_dim(stride, dims)
        if any(extra >= step for extra, step in zip(_per_dim(output_padding, dims), stride, strict=True)):
            return None  # the output then has more patches than the input has positions
        sides = tuple(p for size in reversed(_per_dim(padding, dims)) for p in (size, size))
        forward = Conv(tuple(weight.shape[2:]), stride, sides, _per_dim(dilation, dims), groups)
        return Call(cls(forward), input, weight, None)

    def rows(self, input: Tensor) -> Tensor:
        return self.forward.output_rows(input)

    def output_rows(self, output: Tensor) -> Tensor:
        return self.forward.rows(output)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.forward.groups, -1)).flatten(2).mT

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.mT.reshape(shape)


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
