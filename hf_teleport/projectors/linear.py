"""Linear maps of the last dimension: `F.linear`, and the transposed weight of `x @ W`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_teleport.projectors.base import Call, Projector, register

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


class LastDimension(Projector):
    """Rows are samples, or the tokens of a sequence."""

    def rows(self, input: Tensor) -> Tensor:
        return input.reshape(1, -1, input.shape[-1])

    def output_rows(self, output: Tensor) -> Tensor:
        return output.reshape(1, -1, output.shape[-1])

    def output_shape(self, call: Call) -> tuple[int, ...]:
        return (*call.input.shape[:-1], self.to_matrix(call.weight).shape[-2])


@register(F.linear)
class Linear(LastDimension):
    """`F.linear`, weight (o, d): nn.Linear and its subclasses."""

    @classmethod
    def bind(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
        return Call(cls(), input, weight, bias)


@register(torch.addmm, torch.Tensor.addmm, *MATMULS)
class TransposedLinear(LastDimension):
    """`x @ W` and `torch.addmm(bias, x, W)`, weight (d, o): Transformers' Conv1D (GPT-2) and hand-written layers."""

    @classmethod
    def bind(cls, *tensors: Tensor, **options: Any) -> Call | None:
        if len(tensors) not in (2, 3) or options:
            return None
        *bias, input, weight = tensors
        plain = weight.dim() == 2 and all(b.dim() == 1 for b in bias)
        return Call(cls(), input, weight, bias[0] if bias else None) if plain else None

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.squeeze(0).mT.reshape(shape)

    def outer(self, output_rows: Tensor, rows: Tensor) -> Tensor:
        return (rows.mT @ output_rows).mT
