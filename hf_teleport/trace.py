"""Follow parameters through a forward pass: which operation consumes each, with which input.

A `TorchFunctionMode` sees every torch call before it runs. Following the *operation* and not the module covers weights
that are used functionally while their module's forward never runs, needs no list of module classes, and notices every use
of a tied weight. Nothing is wrapped, patched or hooked on the model.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_teleport.projectors import Call, Projector, projectors_for

# An output head is wide that makes more than so many times what it reads.
_WIDE = 2

# Functions written in Python that hide the operations inside from a mode, and what must be looked at is inside.
COMPOSITES = {F.multi_head_attention_forward}


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


@dataclass
class Use:
    """One followed use of a weight, and the gradient D that backward leaves at its output.

    `reached`: whether the input depends on trained weights, so that a shift of them may shift it.
    """

    call: Call
    output_gradient: Tensor | None = None
    reached: bool = True

    def keep(self, gradient: Tensor) -> None:
        """Hook for the output's gradient. The first backward is the one that is meant; a double backward comes here too."""
        if self.output_gradient is None:
            self.output_gradient = gradient.detach()


Uses = dict[nn.Parameter, dict[Region, list[Use]]]
"""For each parameter the parts of it that multiplied an input, each with its uses in the order of the calls."""


class Trace(TorchFunctionMode):
    """Record every use of the given parameters while the context is open.

    Attributes:
        uses: those that a projector covers.
        other_uses: for each parameter, the names of operations that consumed it otherwise.
        choices: what the model chose by `topk` or `argmax` (the experts of each token), in the order of the calls, each with
            the shape of what it chose from.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self._followed = {id(parameter): parameter for parameter in parameters}
        self._aliases: list[Tensor] = []  # kept, so that no other tensor gets their id
        self.uses: Uses = defaultdict(lambda: defaultdict(list))
        self.other_uses: dict[nn.Parameter, set[str]] = defaultdict(set)
        self.choices: list[tuple[torch.Size, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with without_python_overrides(), self:
                return func(*args, **kwargs)
        output = self._choose(func, args, kwargs) if func in _CHOICES else self._call(func, args, kwargs)
        with torch._C.DisableTorchFunction():  # to look at a weight is not to use it
            touched = [p for p in map(self._parameter, tensors_in((*args, *kwargs.values()))) if p is not None]
            if touched:
                self._record(func, args, kwargs, touched, output)
        return output

    def _call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _parameter(self, tensor: Tensor) -> nn.Parameter | None:
        """The followed parameter that a tensor is, or is a view of."""
        return self._followed.get(id(tensor), self._followed.get(id(tensor._base)))

    def _record(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], touched: list[nn.Parameter], output: Any
    ) -> None:
        if func in _ALIASES:
            # What is done with a detached weight is seen too; autograd does not see it, and so the audit finds it out.
            self._followed[id(output)] = touched[0]
            self._aliases.append(output)
            return
        for family in projectors_for(func):
            call = _bound(family, args, kwargs)
            weight = None if call is None else self._parameter(call.weight)
            if call is not None and weight is not None:
                self._see(weight, Region.of(call.weight, weight), call, output)
                touched = [p for p in touched if p is not weight and p is not call.bias]
                break
        # Attribute getters such as `weight.dtype` come here too, and views, whose own uses are seen: neither is a use.
        if any(o.requires_grad and self._parameter(o) is None for o in tensors_in([output])):
            for parameter in touched:
                self.other_uses[parameter].add(getattr(func, "__name__", str(func)))

    def _see(self, weight: nn.Parameter, region: Region, call: Call, output: Tensor) -> None:
        if hasattr(weight, "whole"):
            # A view would keep the whole values, which a sharded weight has only while its module runs.
            call = replace(call, weight=weight)
        use = Use(call, reached=call.input.requires_grad)
        self.uses[weight][region].append(use)
        if output.requires_grad:
            output.register_hook(use.keep)

    def with_bias(self, bias: nn.Parameter) -> list[Use]:
        """The uses of the first weight to whose product a bias is added."""
        for parts in self.uses.values():
            if found := [use for calls in parts.values() for use in calls if use.call.bias is bias]:
                return found
        return []

    def forget_gradients(self) -> None:
        """Make room for the output gradients of another backward."""
        for parts in self.uses.values():
            for calls in parts.values():
                for use in calls:
                    use.output_gradient = None

    def _choose(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        indices = output if isinstance(output, Tensor) else output.indices
        # A copy: models go on to change indices in place.
        self.choices.append((scores.shape, indices.clone()))
        return output


class ReplayTrace(Trace):
    """A trace of a forward that makes the choices of another one, at other weights.

    A token that a small shift of the weights sends to another expert is a jump, which a derivative does not see.

    Args:
        choices: those of the other forward.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], choices: list[tuple[torch.Size, Tensor]]):
        super().__init__(parameters)
        self._made = iter(choices)

    def _choose(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        shape, made = next(self._made, (None, None))
        indices = output if isinstance(output, Tensor) else output.indices
        if made is None or shape != scores.shape or made.shape != indices.shape:
            return output
        if isinstance(output, Tensor):
            return made.clone()
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return type(output)((scores.gather(dim, made), made.clone()))


Product = Callable[[nn.Parameter, Region, Use, Tensor, dict[Any, Tensor]], Tensor]
"""`product(weight, region, use, shift, known)`: what is summed over the uses of a part of a weight, whose input moved by `shift`.

In `known` it may keep what it makes of this shift alone, for other weights that read the same input.
"""


def plain_product(weight: nn.Parameter, region: Region, use: Use, shift: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """`Dᵀ (X' - X)`, (G, o, d)."""
    return use.call.projector.weight_gradient(shift, use.output_gradient, region.shape)  # type: ignore[arg-type]


class TangentTrace(ReplayTrace):
    """Accumulate products of `X' - X` with D while a forward runs at shifted weights, X' being the shifted inputs.

    A part of a weight whose calls come out differently in the shifted forward gets no product.

    Attributes:
        products: for each part of a weight the sum over its calls; None or absent: there is none.
        squares: likewise `||X' - X||²` and `||X||²`, (2,).

    Args:
        uses: the uses to compare with, with their D, of the parts to follow.
        choices: those of the unshifted forward.
        product: what is made of each use and the shift of its input.
        once: the weights that are used but once in all.
    """

    def __init__(
        self,
        uses: Uses,
        choices: list[tuple[torch.Size, Tensor]],
        product: Product = plain_product,
        once: Collection[nn.Parameter] = (),
    ):
        super().__init__(uses, choices)
        self._once = {id(weight) for weight in once}
        self._left = sum(len(calls) for parts in uses.values() for calls in parts.values())
        self._awaited = {weight: {region: iter(calls) for region, calls in parts.items()} for weight, parts in uses.items()}
        self._product = product
        self._latest: _InputShift | None = None
        self.products: dict[nn.Parameter, dict[Region, Tensor | None]] = defaultdict(dict)
        self.squares: dict[nn.Parameter, dict[Region, Tensor]] = defaultdict(dict)

    def _see(self, weight: nn.Parameter, region: Region, call: Call, output: Tensor) -> None:
        awaited = self._awaited[weight].get(region)
        if awaited is None:
            return
        use = next(awaited, None)
        self._left -= use is not None
        products = self.products[weight]
        if use is None or call.input.shape != use.call.input.shape or call.projector != use.call.projector:
            products[region] = None
        elif use.output_gradient is not None and products.get(region, ()) is not None:
            shift = self._shift(call.input, use.call.input)
            self.squares[weight][region] = self.squares[weight].get(region, 0) + shift.squares
            product = self._product(weight, region, use, shift.value, shift.known)
            known = products.get(region)
            products[region] = product if known is None else known.add_(product)

    def _call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """An output head that nobody waits for behind makes zeros: with a large vocabulary, a good part of a forward."""
        if self._left <= 1:
            with torch._C.DisableTorchFunction():
                for call in filter(None, (_bound(family, args, kwargs) for family in projectors_for(func))):
                    shape = call.projector.output_shape(call)
                    unawaited = self._left == 0 or id(self._parameter(call.weight)) in self._once
                    if shape is not None and unawaited and shape[-1] > _WIDE * call.input.shape[-1]:
                        return call.input.new_zeros(shape)
        return super()._call(func, args, kwargs)

    def _shift(self, moved: Tensor, start: Tensor) -> "_InputShift":
        if self._latest is None or self._latest.moved is not moved or self._latest.start is not start:
            value = moved - start
            self._latest = _InputShift(moved, start, value, torch.stack([norm_of(value), norm_of(start)]).square())
        return self._latest


@dataclass
class _InputShift:
    """`X' - X`, which is one for all weights that read the same input, as those of q, k and v do."""

    moved: Tensor
    start: Tensor
    value: Tensor
    squares: Tensor
    known: dict[Any, Tensor] = field(default_factory=dict)


def norm_of(tensor: Tensor) -> Tensor:
    """Euclidean norm, a float64 scalar: of each row in its own precision, which is fast, and of the rows' norms in float64."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = torch.linalg.vector_norm(real, dim=-1, dtype=torch.promote_types(real.dtype, torch.float32)) if real.dim() else real
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


_ALIASES = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_CHOICES = {torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax}
_BACKWARDS = {torch.autograd.grad, torch.Tensor.backward}
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}


class KeepDouble(TorchFunctionMode):
    """Leave out casts of float64 to float32.

    Many models compute their norms and softmax in float32 whatever the weights are. To lower precisions that adds digits; from
    float64 it takes them away, and a small difference of two forwards would drown in the rounding.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARDS:  # in which a checkpoint runs a forward again
            with without_overrides_of_backward(), self:
                return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in _PRODUCTS and args[1].dtype == torch.float32:  # whole numbers, cast to meet what was not cast
                return func(args[0], args[1].double())
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def keeping_double(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """`KeepDouble` for a forward of weights that are all float64; of others their own way."""
    return KeepDouble() if all(p.dtype == torch.float64 for p in parameters) else nullcontext()


def _bound(family: type[Projector], args: Any, kwargs: dict[str, Any]) -> Call | None:
    try:
        return family.bind(*args, **kwargs)
    except TypeError:  # called by keywords that the family does not name
        return None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@contextmanager
def without_python_overrides() -> Iterator[None]:
    """`torch.nn.functional` runs its Python functions as they are; the operations that they call are still seen."""
    with mock.patch.object(F, "has_torch_function", return_value=False):
        yield


@contextmanager
def without_overrides_of_backward() -> Iterator[None]:
    """Likewise for the functions that go backwards."""
    with (
        mock.patch.object(torch.autograd, "has_torch_function", return_value=False),
        mock.patch.object(torch._tensor, "has_torch_function_unary", return_value=False),
    ):
        yield
