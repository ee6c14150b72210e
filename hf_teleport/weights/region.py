"""The part of a parameter that an operation takes as its weight."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Region:
    """The part of a parameter that an operation takes as its weight: all of it, one expert's slice, or a transposed view."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor) -> "Region":
        """The region of a parameter that a view shows."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()) - int(parameter.storage_offset()))

    def view(self, tensor: Tensor) -> Tensor:
        """The same region of another tensor with the parameter's memory layout."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)
