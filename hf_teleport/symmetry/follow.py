"""Carry the features of every activation through a forward, and note what each operation does to them.

A `TorchFunctionMode` sees every torch call. Next to each tensor that a parameter has written stands a tensor of the same shape
with the numbers of its features; an operation that only moves values about (`view`, `transpose`, an index) is applied to those
numbers too, and so needs no rule of its own. `rules/` has the operations that compute. What has no rule fixes the features that
enter it: a model that does something unknown loses symmetries, and not its outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from hf_teleport.symmetry.features import Facts, Norm, compact
from hf_teleport.trace import COMPOSITES, tensors_in, without_python_overrides

Tag = tuple[Tensor, ...]
"""The features of a tensor, of its shape: one tensor for an activation; for a parameter or a view of it, one for each axis."""


@dataclass
class Call:
    """One torch call after it ran."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    follow: "Follow"

    @property
    def facts(self) -> Facts:
        return self.follow.facts

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tag(self, tensor: Any) -> Tag | None:
        return self.follow.tag(tensor)

    def features(self, tensor: Any) -> Tensor | None:
        """The features of an activation; for a parameter that is used as one, those of its last axis."""
        tag = self.tag(tensor)
        return None if tag is None else tag[-1]

    def fix(self, *tensors: Any, reason: str) -> None:
        """All features of these tensors are fixed, and what comes of them has the reason."""
        for tensor in tensors:
            for features in self.tag(tensor) or ():
                self.facts.note_fixed(features, reason)
        for tensor in tensors_in([self.output]):
            self.follow.reasons[tensor] = reason


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
        self._model = model
        self._rules = rules
        self._tags: Any = WeakIdKeyDictionary()
        self._parameters = {id(parameter): parameter for parameter in model.parameters()}

    @classmethod
    @contextmanager
    def open(cls, model: nn.Module, rules: dict[str, Callable[[Call], Any]]) -> Iterator["Follow"]:
        """Follow the model while the context is open."""
        follow = cls(model, rules)
        with follow._recognised_norms(), follow:
            yield follow

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
        """Let a tensor have these features; those of another shape than the tensor's are fixed instead."""
        if any(features.shape != tensor.shape for features in tag):
            for features in tag:
                self.facts.note_fixed(features, "an operation changed its shape in a way that is not followed")
            return
        self._tags[tensor] = tuple(compact(features).expand(tensor.shape) for features in tag)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with without_python_overrides(), self:
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        known = [t for t in tensors if self.tag(t) is not None]
        name = operation_name(func)
        call = Call(name, func, args, kwargs, output, self)
        if known and (name in self._rules or any(True for _ in tensors_in([output]))):
            rule = self._rules.get(name)
            if rule is None:
                call.fix(*known, reason=f"passes through {name}")
            else:
                self._keep(output, rule(call))
        elif tensors:
            reason = next((self.reasons[t] for t in tensors if t in self.reasons), None)
            for tensor in tensors_in([output]):
                if reason:
                    self.reasons[tensor] = reason
        return output

    def _keep(self, output: Any, tag: Any) -> None:
        if tag is None:
            return
        if isinstance(output, Tensor):
            self.give(output, tag)
        else:
            for tensor, own in zip(output, tag, strict=True):
                self.give(tensor, own)

    @contextmanager
    def _recognised_norms(self) -> Iterator[None]:
        """Take a module for an RMS norm if its output is one, however it is written."""
        marks: dict[nn.Module, tuple[int, ...]] = {}

        def before(module: nn.Module, inputs: Any) -> None:
            marks[module] = self.facts.mark()

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._recognise(module, inputs, output, marks.pop(module))

        with ExitStack() as stack:
            for module in self._model.modules():
                if _may_be_norm(module):
                    stack.callback(module.register_forward_pre_hook(before).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            yield

    def _recognise(self, module: nn.Module, inputs: Any, output: Any, mark: tuple[int, ...]) -> None:
        x = inputs[0] if inputs else None
        tag = self.tag(x)
        if tag is None or not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape:
            return
        gain = next(module.parameters(recurse=False), None)
        offset = rms_offset(x, output, gain)
        # Anything that scales would pass for a norm of inputs that happen to have length one; a norm does not see a factor.
        if offset is None or not torch.allclose(module.forward(16 * x, *inputs[1:]), output, rtol=1e-2, atol=1e-3):
            return
        self.facts.forget_since(mark)
        self.reasons.pop(output, None)
        features = note_norm(self.facts, tag[-1], gain, None, offset)
        self.give(output, (features,))


def note_norm(facts: Facts, x: Tensor, gain: nn.Parameter | None, bias: nn.Parameter | None, offset: float) -> Tensor:
    """Note an RMS norm over the last dim of features x (..., d), and return the features of its output."""
    ids = compact(x)
    shared = [dim for dim, size in enumerate(ids.shape[:-1]) if size > 1]
    facts.note_together(ids, tuple(shared))
    facts.note_flag(ids, "normed")
    if gain is None:
        return x
    own = facts.axis(gain, 0).features
    if shared:  # one gain for each head: it has no features of its own
        facts.norms.append(Norm(gain, bias, offset, ids, ids))
        return x
    if bias is not None:
        facts.note_same(facts.axis(bias, 0).features, own)
        facts.writes.add((bias, 0))
    facts.norms.append(Norm(gain, bias, offset, ids.flatten(), own))
    return own.expand(x.shape)


def operation_name(function: Callable[..., Any]) -> str:
    """A function's plain name: 'add' for `torch.add`, `Tensor.add_`, `__add__`, `__radd__` and `__iadd__`; that of a property."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    plain = name.strip("_")
    if name.startswith("__") and plain[:1] in ("r", "i") and plain[1:] in ("add", "sub", "mul", "div", "truediv", "matmul"):
        return f"r{plain[1:]}" if plain[0] == "r" and plain[1:] in ("sub", "div", "truediv", "matmul") else plain[1:]
    return plain


def _may_be_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return (
        not list(module.children())
        and len(parameters) <= 1
        and all(p.dim() == 1 for p in parameters)
        and not list(module.buffers())
    )


def rms_offset(x: Tensor, y: Tensor, gain: Tensor | None) -> float | None:
    """Whether `y = (offset + gain) x / rms(x)` with an offset of 0 or 1, up to the epsilon in rms; None if not.

    Args:
        x, y: (..., d); the epsilon is whatever is left of `rms` and must be the same for all rows.
    """
    if gain is not None and gain.shape != x.shape[-1:]:
        return None
    x, y = x.detach().double().reshape(-1, x.shape[-1]), y.detach().double().reshape(-1, x.shape[-1])
    rows = x.square().sum(-1) > 0
    x, y = x[rows], y[rows]
    square = x.square().mean(-1)
    for offset in (0.0, 1.0) if gain is not None else (1.0,):
        scaled = x * (offset + (0 if gain is None else gain.detach().double()))
        # The best scale of each row, and whether it explains the row.
        scale = (y * scaled).sum(-1) / scaled.square().sum(-1).clamp_min(1e-300)
        if (y - scale[:, None] * scaled).norm() > 1e-2 * y.norm() or not (scale > 0).all():
            continue
        epsilon = scale.pow(-2) - square
        if bool((epsilon.abs() <= 0.02 * square + 1e-2).all()):
            return offset
    return None
