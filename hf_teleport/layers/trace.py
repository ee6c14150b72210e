"""Trace the parameters through a forward pass: which operation uses each one, and with which input.

A `TorchFunctionMode` sees every torch call before it runs. It follows *operations* and not modules. So it also sees weights that
are used functionally, without a call of their module. It needs no list of module classes, and sees every use of a tied weight.
The model is not wrapped, patched or hooked.
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

# Python functions that hide their inner operations from a mode. These operations must be seen.
COMPOSITES = {F.multi_head_attention_forward}


@dataclass
class Use:
    """One followed use of a weight, and the gradient D at its output, which the backward sets.

    `reached`: whether the input depends on trained weights, so that a shift of these may change it.
    """

    call: Call
    output_gradient: Tensor | None = None
    reached: bool = True

    def keep(self, gradient: Tensor) -> None:
        """Hook for the output's gradient. Keeps that of the first backward. A double backward calls it again."""
        if self.output_gradient is None:
            self.output_gradient = gradient.detach()


Uses = dict[nn.Parameter, dict[Region, list[Use]]]
"""For each parameter: the parts of it that multiply an input. For each part: its uses, in the order of the calls."""


class Trace(TorchFunctionMode):
    """Record every use of the given parameters while the context is open.

    Attributes:
        uses: the uses that a projector covers.
        other_uses: for each parameter, the names of other operations that use it.
        choices: the indices that the model chose by `topk` or `argmax`, such as the experts of each token, in the order of the
            calls. Each has the shape of the scores that it chose from.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self._followed = {id(parameter): parameter for parameter in parameters}
        self._aliases: list[Tensor] = []  # kept alive, so that no other tensor gets the same id
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
        with torch._C.DisableTorchFunction():  # looking at a weight here is not a use
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
            # Follow the detached weight too. Autograd does not see its uses, so the audit will reject the weight.
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
        # Attribute getters such as `weight.dtype` and views come here too. Neither is a use; the uses of a view are seen later.
        if any(o.requires_grad and self._parameter(o) is None for o in tensors_in([output])):
            for parameter in touched:
                self.other_uses[parameter].add(getattr(func, "__name__", str(func)))

    def _see(self, weight: nn.Parameter, region: Region, call: Call, output: Tensor) -> None:
        if isinstance(weight, Shard):
            # Keep the stand-in and not a view, which would keep the whole weight in memory after its module has run.
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
        """Clear all D, so that another backward can set them."""
        for parts in self.uses.values():
            for calls in parts.values():
                for use in calls:
                    use.output_gradient = None

    def _choose(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        indices = output if isinstance(output, Tensor) else output.indices
        # A copy, because models change the indices in place afterwards.
        self.choices.append((scores.shape, indices.clone()))
        return output


class ReplayTrace(Trace):
    """A trace of a forward that repeats the choices of an earlier forward at other weights.

    A small shift of the weights may send a token to another expert. That is a jump, and derivatives must not include it.

    Args:
        choices: `Trace.choices` of the earlier forward.
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
    except TypeError:  # the call has keywords that the family does not know
        return None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values, also inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@contextmanager
def without_python_overrides() -> Iterator[None]:
    """Inside, a mode does not see calls of `torch.nn.functional` as such, but still sees the operations that they make."""
    with mock.patch.object(F, "has_torch_function", return_value=False):
        yield
