"""Products of tensors with a weight that is not a plain `x @ W`: from the left, one matrix for each expert, any einsum."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_teleport.projectors.base import Call, Projector, register
from hf_teleport.projectors.linear import MATMULS


@register(*MATMULS)
class LeftProduct(Projector):
    """`W @ x`, weight (o, d), x (..., d, N): Mamba's `dt_proj`. Rows are the columns of x."""

    @classmethod
    def bind(cls, *tensors: Tensor, **options: Any) -> Call | None:
        if len(tensors) != 2 or options or tensors[0].dim() != 2 or tensors[1].dim() < 2:
            return None
        return Call(cls(), tensors[1], tensors[0], None)

    def rows(self, input: Tensor) -> Tensor:
        return input.mT.reshape(1, -1, input.shape[-2])

    def output_rows(self, output: Tensor) -> Tensor:
        return output.mT.reshape(1, -1, output.shape[-2])


class _Stacked(Projector):
    """Weights (G, d, o), one matrix for each group, multiplied from the right."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.mT.reshape(shape)

    def outer(self, output_rows: Tensor, rows: Tensor) -> Tensor:
        return (rows.mT @ output_rows).mT


@register(torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
class BatchedProduct(_Stacked):
    """`torch.bmm(x, W)`, x (G, N, d), weight (G, d, o): experts that all get their own rows."""

    @classmethod
    def bind(cls, *tensors: Tensor, **options: Any) -> Call | None:
        if len(tensors) != 2 or options or any(t.dim() != 3 for t in tensors) or len(tensors[0]) != len(tensors[1]):
            return None
        return Call(cls(), tensors[0], tensors[1], None)

    def rows(self, input: Tensor) -> Tensor:
        return input

    def output_rows(self, output: Tensor) -> Tensor:
        return output


@register(*(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f))
@dataclass(frozen=True)
class GroupedProduct(_Stacked):
    """`grouped_mm(x, W, offs)`, x (N, d) sorted by expert, weight (experts, d, o): each expert multiplies its own rows.

    Experts get different numbers of rows; zero rows, which add nothing to any sum over rows, fill up the difference.
    """

    ends: tuple[int, ...]  # of each expert's rows

    @classmethod
    def bind(cls, input: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Call | None:
        plain = offs is not None and input.dim() == 2 and weight.dim() == 3 and not any(v is not None for v in options.values())
        return Call(cls(tuple(offs.tolist())), input, weight, None) if plain and offs is not None else None

    def rows(self, input: Tensor) -> Tensor:
        starts = (0, *self.ends[:-1])
        return pad_sequence([input[start:end] for start, end in zip(starts, self.ends, strict=True)], batch_first=True)

    def output_rows(self, output: Tensor) -> Tensor:
        return self.rows(output)


@register(torch.einsum)
@dataclass(frozen=True)
class Einsum(Projector):
    """`torch.einsum` of an input and a weight: XLNet's attention, mixers, hand-written layers.

    Each index is one of four. In input, weight and output it counts groups. In input and output it counts rows. In input and
    weight it is summed, d. In weight and output it is o.
    """

    input_indices: str
    weight_indices: str
    output_indices: str
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def bind(cls, equation: Any, *operands: Any) -> Call | None:
        if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        terms = inputs.split(",")
        # The weight is whichever operand is a parameter or a view of one; autograd made the other.
        weight_at = next((i for i in (1, 0) if _is_parameter(operands[i])), None)
        if weight_at is None:
            return None
        input, weight = operands[1 - weight_at], operands[weight_at]
        first, second = terms[1 - weight_at], terms[weight_at]
        unique = all(len(set(term)) == len(term) for term in (first, second, output))
        # Every index must have one of the four roles.
        kept = set(output) | (set(first) & set(second))
        if not unique or not set(first + second) <= kept:
            return None
        sizes = tuple(zip(second, weight.shape, strict=True))
        return Call(cls(first, second, output, sizes), input, weight, None)

    def _indices(self) -> tuple[str, str, str]:
        groups = "".join(i for i in self.weight_indices if i in self.input_indices and i in self.output_indices)
        summed = "".join(i for i in self.weight_indices if i in self.input_indices and i not in self.output_indices)
        made = "".join(i for i in self.weight_indices if i not in self.input_indices)
        return groups, summed, made

    def _as_rows(self, tensor: Tensor, indices: str, last: str) -> Tensor:
        groups, _, _ = self._indices()
        counted = "".join(i for i in indices if i not in groups + last)
        aligned = torch.einsum(f"{indices}->{groups}{counted}{last}", tensor)
        count = len(groups)
        lead = aligned.shape[:count].numel()
        return aligned.reshape(lead, -1, aligned.shape[len(groups + counted) :].numel())

    def rows(self, input: Tensor) -> Tensor:
        return self._as_rows(input, self.input_indices, self._indices()[1])

    def output_rows(self, output: Tensor) -> Tensor:
        return self._as_rows(output, self.output_indices, self._indices()[2])

    def to_matrix(self, weight: Tensor) -> Tensor:
        groups, summed, made = self._indices()
        aligned = torch.einsum(f"{self.weight_indices}->{groups}{made}{summed}", weight)
        size = dict(self.sizes)
        lead, o = (math.prod(size[i] for i in part) for part in (groups, made))
        return aligned.reshape(lead, o, -1)

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        order = "".join(self._indices()[i] for i in (0, 2, 1))
        size = dict(self.sizes)
        return torch.einsum(f"{order}->{self.weight_indices}", matrix.reshape([size[i] for i in order])).reshape(shape)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
