"""The part of a parameter that an operation takes as its weight."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Region:
    """The part of a parameter that an operation takes as its weight: the whole, one expert's slice, a transposed view."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor) -> "Region":
        """Where a view of a parameter lies in it."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()) - int(parameter.storage_offset()))

    def view(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor that is laid out like the parameter."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)
