"""The interface of layer families, and their registry.

Teleportation needs one view of a layer: `Z = X Wᵀ`, with the layer's input as rows X and its weight as a matrix W. A `Projector`
gives that view for one operation, for instance `torch.nn.functional.linear`. The registry is keyed by the operation that
*consumes* the weight, and not by module class. So `nn.Linear`, a subclass of it, and a bare `nn.Parameter` in `F.linear` are one
case, whatever library they come from. To add a family, subclass `Projector`, fill in three methods and decorate it with
`@register(the_function)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One use of a weight: `output = operation(input, weight) + bias`."""

    projector: "Projector"
    input: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Projector(ABC):
    """The matrix view of one operation with fixed options (stride, groups, ...).

    G is the number of groups (1 unless the operation splits its channels), and N the number of rows (samples, tokens or patches).
    The input width of one group is d and its output width o. A bias is added per output channel, to every row.
    """

    role: ClassVar[str] = "linear"

    @classmethod
    @abstractmethod
    def bind(cls, *args: Any, **kwargs: Any) -> Call | None:
        """Read the operation's arguments. None: called in a way that this family does not cover."""

    @abstractmethod
    def rows(self, input: Tensor) -> Tensor:
        """X: the operation's input as rows, (G, N, d)."""

    @abstractmethod
    def output_rows(self, output: Tensor) -> Tensor:
        """Z, or the gradient D with respect to it, as rows, (G, N, o)."""

    def output_shape(self, call: Call) -> tuple[int, ...] | None:
        """The shape of a call's result; None: only the operation itself knows."""
        return None

    def to_matrix(self, weight: Tensor) -> Tensor:
        """W: the weight as matrices, (G, o, d). Default: it is one matrix (o, d)."""
        return weight.unsqueeze(0)

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `to_matrix`: (G, o, d) back to the weight's own shape."""
        return matrix.reshape(shape)

    def weight_gradient(self, input: Tensor, output_gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`Dᵀ X`, (G, o, d): the gradient of a weight of this shape. Override it where X is wasteful to build."""
        return self.outer(self.output_rows(output_gradient), self.rows(input))

    def outer(self, output_rows: Tensor, rows: Tensor) -> Tensor:
        """`Dᵀ X` of rows, (G, o, d). It should have the strides of a weight's `to_matrix`, because it is added to one."""
        return output_rows.mT @ rows


_REGISTRY: dict[Callable[..., Any], list[type[Projector]]] = {}
_P = TypeVar("_P", bound=type[Projector])


def register(*operations: Callable[..., Any]) -> Callable[[_P], _P]:
    """Class decorator: this family covers these functions, as a `TorchFunctionMode` sees them.

    Several families may cover one function: a matrix product has its weight on the right or on the left. They are asked from the
    last registered to the first, and the first whose `bind` finds a followed weight is taken.
    """

    def decorate(projector: _P) -> _P:
        for operation in operations:
            _REGISTRY[operation] = [projector, *_REGISTRY.get(operation, [])]
        return projector

    return decorate


def projectors_for(operation: Callable[..., Any]) -> list[type[Projector]]:
    """The families that cover an operation."""
    return _REGISTRY.get(operation, [])
