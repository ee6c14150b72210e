"""Follow parameters through a forward pass: which operation consumes each, with which input.

A `TorchFunctionMode` sees every torch call before it runs. Following the *operation* and not the module covers weights that are
used functionally while their module's forward never runs. It needs no list of module classes, and sees every use of a tied
weight. Nothing is wrapped, patched or hooked on the model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_teleport.projectors import Call, Projector, projectors_for
from hf_teleport.weights.region import Region
from hf_teleport.weights.shards import Shard

# Functions written in Python that hide the operations inside from a mode, and what must be looked at is inside.
COMPOSITES = {F.multi_head_attention_forward}


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
            call = bound(family, args, kwargs)
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
        if isinstance(weight, Shard):
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


_ALIASES = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_CHOICES = {torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax}


def bound(family: type[Projector], args: Any, kwargs: dict[str, Any]) -> Call | None:
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
