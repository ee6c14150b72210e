"""Carry the features of every activation through a forward, and note what each operation does to them.

A `TorchFunctionMode` sees every torch call. Each tensor that depends on a parameter has a companion of the same shape, with the
numbers of its features. An operation that only moves values (`view`, `transpose`, an index) is applied to those numbers too, and
so needs no rule of its own. `rules/` has the operations that compute. An operation without a rule fixes the features that enter
it: a model that does something unknown loses symmetries, and not its outputs.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from hf_teleport.layers.trace import COMPOSITES, tensors_in, without_python_overrides
from hf_teleport.methods.basis.features import Facts, compact

logger = logging.getLogger(__name__)

# The operations whose rule has failed in this process: a model calls one in every layer.
_FAILED: set[str] = set()

Tag = tuple[Tensor, ...]
"""The features of a tensor, of its shape: one tensor for an activation; for a parameter or a view of it, one for each axis."""


# What a call that returns no tensor may tell of one: its kind, and none of its values.
_ABOUT = {
    *("size", "shape", "dim", "ndim", "ndimension", "dtype", "device", "numel", "nelement", "stride", "storage_offset", "layout"),
    *("requires_grad", "len", "grad", "grad_fn", "version", "names", "get_device", "element_size", "itemsize", "nbytes", "hash"),
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "data_ptr", "untyped_storage", "repr", "format"),
}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}


@dataclass
class Call:
    """One torch call after it ran."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    follow: "Follow"
    looked_at: set[int] = field(default_factory=set)

    @property
    def facts(self) -> Facts:
        """What is known of all features so far."""
        return self.follow.facts

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, given by position or by one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def tag(self, tensor: Any) -> Tag | None:
        """The features of a tensor. A tensor that its rule never asks about is fixed."""
        self.looked_at.add(id(tensor))
        return self.follow.tag(tensor)

    def features(self, tensor: Any) -> Tensor | None:
        """The features of an activation. For a parameter used as an activation: those of its last axis; the rest is fixed."""
        tag = self.tag(tensor)
        for other in tag[:-1] if tag else ():
            self.facts.note_fixed(other, "its rows are used as values")
        return None if tag is None else tag[-1]

    def is_zero(self, value: Any) -> bool:
        """Whether a value is zero for every batch: the number 0, or a tensor that was made of zeros."""
        if isinstance(value, Tensor):
            zeros = self.follow.zeros
            return value.numel() == 0 or value in zeros or (value._base is not None and value._base in zeros)
        return isinstance(value, (int, float)) and value == 0

    def fix(self, *tensors: Any, reason: str) -> None:
        """All features of these tensors are fixed, and what comes of them has the reason."""
        for tensor in tensors:
            for features in self.tag(tensor) or ():
                self.facts.note_fixed(features, reason)
        for tensor in tensors_in([self.output]):
            self.follow.forget(tensor, reason)


class Follow(TorchFunctionMode):
    """Note the facts of all that runs while the context is open.

    Args:
        model: its parameters are followed, and its handwritten norms recognised by what they compute.
        rules: for each operation's name what becomes of its features: a rule notes facts and returns the features of the output,
            or None when it has none.
    """

    def __init__(self, model: nn.Module, rules: dict[str, Callable[[Call], Any]]):
        super().__init__()
        self.facts = Facts()
        self.reasons: Any = WeakIdKeyDictionary()  # why a tensor has no features
        self.zeros: Any = WeakIdKeyDictionary()
        self._rules = rules
        self._tags: Any = WeakIdKeyDictionary()
        self._seen: Any = WeakIdKeyDictionary()
        self._parameters = {id(parameter): parameter for parameter in model.parameters()}

    def tag(self, tensor: Any) -> Tag | None:
        """The features of a tensor, None if it has none: a constant, or an output of something without a rule."""
        if not isinstance(tensor, Tensor):
            return None
        parameter = self._parameters.get(id(tensor))
        if parameter is None:
            return self._tags.get(tensor)
        tag = []
        for dim in range(parameter.dim()):
            shape = [1] * parameter.dim()
            shape[dim] = -1
            tag.append(self.facts.axis(parameter, dim).features.reshape(shape).expand(parameter.shape))
        return tuple(tag) or None

    def parameter(self, tensor: Any) -> nn.Parameter | None:
        """The parameter that a tensor is."""
        return self._parameters.get(id(tensor))

    def give(self, tensor: Tensor, tag: Tag) -> None:
        """Give a tensor these features. If their shape differs from the tensor's, they are fixed instead."""
        if any(features.shape != tensor.shape for features in tag):
            for features in tag:
                self.facts.note_fixed(features, "an operation changed its shape in a way that is not followed")
            return
        self.zeros.pop(tensor, None)
        self._tags[tensor] = tuple(compact(features).expand(tensor.shape) for features in tag)

    def forget(self, tensor: Tensor, reason: str) -> None:
        """Remove a tensor's features, and keep the reason."""
        self._tags.pop(tensor, None)
        self.reasons[tensor] = reason

    def fix_outputs(self, output: Any) -> None:
        """What the model gives to its user is fixed; hidden states, attentions and caches are its own affair."""
        values = [value for name, value in output.items() if not _internal(name)] if isinstance(output, Mapping) else [output]
        for tensor in tensors_in(values):
            for features in self.tag(tensor) or ():
                self.facts.note_fixed(features, "it is an output of the model")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with without_python_overrides(), self:
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if not args and kwargs:  # an operand by name: input=, tensors=
            first, *_ = kwargs
            args, kwargs = (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}
        call = Call(operation_name(func), func, args, kwargs, output, self)
        operands = list(tensors_in([*args, *kwargs.values()]))
        self._distrust(operands)
        known = [t for t in operands if self.tag(t) is not None]
        outputs = list(tensors_in([output]))
        written = _written(func, args, kwargs)
        into_part = bool(known) and any(self._has_aliases(t) for t in written)
        if into_part and "out" not in kwargs:
            call.fix(*known, *written, reason=f"{call.name} writes into a part of it")
        elif known:
            self._apply(call, known, outputs)
        else:
            self._follow_constant(operands, outputs, written)
        for tensor in written if into_part else []:
            self._forget_aliases(tensor, f"{call.name} has written into a part of it")
        for tensor in outputs:
            self._seen[tensor] = True
            if call.name in _ZEROS:
                self.zeros[tensor] = True
        return output

    def _apply(self, call: Call, known: list[Tensor], outputs: list[Tensor]) -> None:
        """The rule for a call with features, if there is one and it can read the call."""
        rule = self._rules.get(call.name)
        if rule is None:
            if outputs or not (call.name in _ABOUT or call.name.startswith("is_")):
                call.fix(*known, reason=f"passes through {call.name}")
            return
        mark = self.facts.mark()
        try:
            tag = rule(call)
        except Exception as error:  # arguments in a form that it does not know, or a fault of the rule
            _warn_once(call.name, error)
            self.facts.forget_since(mark)
            call.fix(*known, reason=f"passes through {call.name} in a form that is not known")
            return
        for tensor in known:
            if id(tensor) not in call.looked_at:
                call.fix(tensor, reason=f"goes into {call.name} beside what it works on")
        self._keep(call.output, tag)

    def _follow_constant(self, operands: list[Tensor], outputs: list[Tensor], written: list[Tensor]) -> None:
        """Follow a call whose operands have no features. The outputs have none either, for the same reason."""
        reason = next((self.reasons[t] for t in operands if t in self.reasons), None)
        for tensor in outputs if reason else []:
            self.reasons[tensor] = reason
        for tensor in written:
            for alias in self._aliases(tensor):
                self.zeros.pop(alias, None)

    def _distrust(self, operands: list[Tensor]) -> None:
        """A tensor that has a history, but came from no call that was seen, may depend on anything."""
        for tensor in operands:
            if tensor.grad_fn is not None and self.tag(tensor) is None and tensor not in self._seen:
                self._seen[tensor] = True
                self.facts.fix_all("the model computes in a way that torch functions do not show (a compiled or scripted part)")

    def _aliases(self, tensor: Tensor) -> list[Tensor]:
        """The known tensors that share a tensor's memory."""
        base = tensor if tensor._base is None else tensor._base
        candidates = [*self._tags, *self.zeros]
        return [t for t in candidates if t is base or t._base is base]

    def _has_aliases(self, tensor: Tensor) -> bool:
        return tensor._base is not None or any(t is not tensor for t in self._aliases(tensor))

    def _forget_aliases(self, tensor: Tensor, reason: str) -> None:
        for alias in {
            id(t): t for t in (*self._aliases(tensor), tensor, *([] if tensor._base is None else [tensor._base]))
        }.values():
            for features in self.tag(alias) or ():
                self.facts.note_fixed(features, reason)
            self.zeros.pop(alias, None)
            self.forget(alias, reason)

    def _keep(self, output: Any, tag: Any) -> None:
        if tag is None:
            return
        if isinstance(output, Tensor):
            self.give(output, tag)
        else:
            for tensor, own in zip(output, tag, strict=True):
                self.give(tensor, own)


def _warn_once(name: str, error: Exception) -> None:
    if name not in _FAILED:
        _FAILED.add(name)
        logger.warning(
            "The symmetry rule of the operation %r failed with %s: %s. No weight turns wrongly for it, but symmetries may be "
            "missed; please report this model.",
            name,
            type(error).__name__,
            error,
        )


def operation_name(function: Callable[..., Any]) -> str:
    """A function's plain name: 'add' for `torch.add`, `Tensor.add_`, `__add__`, `__radd__` and `__iadd__`; a property's name."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    plain = name.strip("_")
    if name.startswith("__") and plain[:1] in ("r", "i") and plain[1:] in ("add", "sub", "mul", "div", "truediv", "matmul"):
        return f"r{plain[1:]}" if plain[0] == "r" and plain[1:] in ("sub", "div", "truediv", "matmul") else plain[1:]
    return plain


def _written(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What a call writes into: `out`, or the first argument of `add_`, `__iadd__`, `__setitem__`. Most make something new."""
    if "out" in kwargs:
        return list(tensors_in([kwargs["out"]]))
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("_") and name not in ("requires_grad_", "detach_")
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return list(tensors_in(args[:1])) if name == "__setitem__" or operator or in_place else []


def _internal(name: str) -> bool:
    return name.endswith(("hidden_states", "attentions")) or name in ("loss", "past_key_values", "encoder_last_hidden_state")
