"""Bilinear layers: rows are the outer products of the two inputs."""

import torch.nn.functional as F
from torch import Tensor

from hf_teleport.projectors.base import Call, register
from hf_teleport.projectors.linear import LastDimension


@register(F.bilinear)
class Bilinear(LastDimension):
    """`F.bilinear(x1, x2, W, b)`, weight (o, d1, d2): linear in the d1 d2 products of an entry of x1 with one of x2."""

    @classmethod
    def bind(cls, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return Call(cls(), products, weight, bias)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).unsqueeze(0)
