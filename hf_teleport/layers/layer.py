"""A layer that may move: a weight and its bias, seen as one matrix by a projector."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.layers.subspace import Representation, Subspace
from hf_teleport.layers.trace import Use
from hf_teleport.projectors import Projector
from hf_teleport.weights.region import Region
from hf_teleport.weights.shards import whole_of


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of the model as matrices W (G, o, d). A trainable bias is one more column.

    The weight is a parameter, or a region of one. The bias takes part by appending a 1 to the input: `[X 1] [W b]ᵀ`. The
    projector comes from one use of the weight. Another use may give each expert another number of rows.
    """

    name: str
    role: str
    weight: nn.Parameter
    region: Region
    bias: nn.Parameter | None
    projector: Projector

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it moves too."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def rows(self, projector: Projector, input: Tensor) -> Tensor:
        """The input of a use as rows (G, N, d), with a 1 appended if there is a bias (d + 1)."""
        rows = projector.rows(input)
        if self.bias is None:
            return rows
        return torch.cat([rows, rows.new_ones((*rows.shape[:-1], 1))], dim=-1)

    def reads(self, uses: list[Use]) -> Hashable:
        """A key for the rows of some uses: layers with equal keys have equal rows, as long as the inputs exist."""
        return self.bias is None, tuple((id(use.call.input), use.call.projector) for use in uses)

    def represent(self, uses: list[Use], representation: Representation) -> None:
        """Add the inputs of all uses to a representation. Slices of the batch limit the memory for a convolution's patches."""
        for use in uses:
            input = use.call.input.detach()
            batched = input.dim() == len(self.region.shape)
            slices = max(1, input.shape[0] // 64) if self.projector.role == "conv" and batched else 1
            for part in input.tensor_split(slices):
                representation.add(self.rows(use.call.projector, part))

    def tangent(
        self, use: Use, shift: Tensor, subspace: Subspace | None = None, known: dict[Any, Tensor] | None = None
    ) -> Tensor:
        """`Dᵀ Ẋ` for a use whose input shifts by Ẋ, or `Dᵀ Ẋ P` with a subspace: (G, o, d or d + 1).

        The ones that are appended for a bias do not shift.

        Args:
            known: a cache of results that depend on this shift only, shared with layers that read the same input.

        Raises:
            ValueError: the use has no D.
        """
        if use.output_gradient is None:
            raise ValueError(f"the backward pass has not come to this use of {self.name}; take the gradients of the point first.")
        projector = use.call.projector
        if subspace is not None and projector.role != "conv":
            gradients = projector.output_rows(use.output_gradient)
            # Project whichever has fewer rows: the shift, or (below) its product with D.
            if gradients.shape[-2] < gradients.shape[-1]:
                known = {} if known is None else known
                key = id(subspace), projector, self.bias is None
                if key not in known:
                    known[key] = subspace.project(self._with_zeros(projector.rows(shift)))
                return projector.outer(gradients, known[key])
        product = self._with_zeros(projector.weight_gradient(shift, use.output_gradient, self.region.shape))
        return product if subspace is None else subspace.project(product)

    def _with_zeros(self, matrix: Tensor) -> Tensor:
        return matrix if self.bias is None else torch.cat([matrix, matrix.new_zeros((*matrix.shape[:-1], 1))], dim=-1)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (G, o, d or d + 1)."""
        return tuple(self.matrix({p: laid_out_like(p, None, device="meta") for p in self.parameters}).shape)

    def matrix(self, tensors: dict[nn.Parameter, Tensor | None]) -> Tensor:
        """Values for weight and bias, such as gradients, as one matrix (G, o, d or d + 1)."""
        weight = laid_out_like(self.weight, tensors[self.weight])
        matrix = self.projector.to_matrix(self.region.view(weight))
        if self.bias is None:
            return matrix
        bias = tensors[self.bias]
        bias = matrix.new_zeros(self.bias.shape) if bias is None else bias
        return torch.cat([matrix, bias.reshape(*matrix.shape[:-1], 1)], dim=-1)

    @torch.no_grad()
    def add_(self, move: Tensor, scale: float, to: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter) -> None:
        """Add `scale * move`, (G, o, d or d + 1), to weight and bias in place, or to the tensors that `to` returns for them."""
        if self.bias is not None:
            bias = to(self.bias)
            bias.add_(move[..., -1].reshape(bias.shape), alpha=scale)
            move = move[..., :-1]
        self.region.view(to(self.weight)).add_(self.projector.from_matrix(move, self.region.shape), alpha=scale)


def laid_out_like(
    parameter: Tensor, values: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The values (None: zeros) in the memory layout of the whole parameter, so that its regions apply to them."""
    whole = whole_of(parameter)
    if values is not None and values.stride() == whole.stride():
        return values
    dtype = dtype or (parameter.dtype if values is None else values.dtype)
    laid_out = torch.empty_strided(whole.shape, whole.stride(), dtype=dtype, device=device or parameter.device)
    return laid_out.zero_() if values is None else laid_out.copy_(values)


def weight_error(parameter: nn.Parameter, parts: dict[Region, list[Use]], gradient: Tensor) -> float:
    """The relative difference between a weight's gradient and `Dᵀ X`, summed over its followed uses."""
    followed = laid_out_like(parameter, None)
    for region, calls in parts.items():
        for use in calls:
            if use.output_gradient is not None:
                projector = use.call.projector
                product = projector.weight_gradient(use.call.input.detach(), use.output_gradient, region.shape)
                region.view(followed).add_(projector.from_matrix(product, region.shape))
    return _relative(followed.sub_(gradient), gradient)


def bias_error(uses: list[Use], gradient: Tensor) -> float:
    """The relative difference between a bias's gradient and `Dᵀ 1`, summed over the uses of its weight."""
    followed = torch.zeros_like(gradient)
    for use in uses:
        if use.output_gradient is not None:
            followed += use.call.projector.output_rows(use.output_gradient).sum(1).reshape(gradient.shape)
    return _relative(followed - gradient, gradient)


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm().clamp_min(torch.finfo(reference.dtype).tiny))
