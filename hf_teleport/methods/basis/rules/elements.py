"""Sums and products of elements, and sums over tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.features import NONE, compact, varies
from hf_teleport.methods.basis.follow import Call, Tag
from hf_teleport.methods.basis.rules.base import rule, why


@rule("add", "sub", "rsub")
def add(call: Call) -> Any:
    """Two branches meet: their features are the same. A constant breaks every rotation, unless it is zero."""
    a, b = call.args[0], call.argument(1, "other")
    fa, fb = call.features(a), call.features(b)
    if fa is None or fb is None:
        known, other = (fb, a) if fa is None else (fa, b)
        if known is None or not call.is_zero(other):
            call.fix(a, b, reason=why(call, [t for t in (a, b) if isinstance(t, Tensor)], "a constant is added"))
            return None
        return (known.expand(call.output.shape),)
    call.facts.note_same(fa, fb)
    call.facts.note_together(fa)
    if not any(isinstance(call.follow.parameter(t), nn.Parameter) and t.dim() == 1 for t in (a, b)):
        call.facts.note_flag(fa, "residual")
    wider = fa if len(varies(fa)) >= len(varies(fb)) else fb
    return (torch.where(wider == NONE, fb if wider is fa else fa, wider).expand(call.output.shape),)


@rule("mul", "div", "truediv", "multiply", "true_divide")
def scale(call: Call) -> Any:
    """Features times a coefficient: only those with the same coefficient may be mixed."""
    a, b = call.args[0], call.argument(1, "other")
    fa, fb = call.features(a), call.features(b)
    if fa is not None and fb is not None:
        for factor, scaled in ((call.follow.parameter(a), fb), (call.follow.parameter(b), fa)):
            if factor is not None and factor.numel() == factor.shape[-1]:  # a layer scale
                call.facts.note_fixed(call.facts.axis(factor, -1).features, "a factor of its own for each feature")
                call.facts.factors.append((factor, compact(scaled)))
                return (scaled.expand(call.output.shape),)
        call.fix(a, b, reason="multiplied with other features, element by element")
        return None
    features, coefficient = (fa, b) if fa is not None else (fb, a)
    if features is None or (fa is None and "div" in call.name):
        call.fix(a, b, reason=f"passes through {call.name}")
        return None
    return _coefficients(call, features, coefficient, "multiplied by a number of its own, as by a rotary embedding or a gate")


def _coefficients(call: Call, features: Tensor, coefficient: Any, split: str) -> Tag:
    shape = call.output.shape
    features = compact(features.expand(shape))
    if isinstance(coefficient, Tensor):
        # By shape and not by value: what happens to be uniform on this batch need not be on the next.
        differs = coefficient.expand(shape).stride()
        keyed = tuple(d for d, size in enumerate(features.shape) if size > 1 and differs[d] != 0)
        if keyed:
            call.facts.note_together(features, keyed, split=split)
    return (features.expand(shape),)


@rule("masked_fill")
def masked_fill(call: Call) -> Any:
    """Zero for some tokens."""
    x, mask, value = call.args[0], call.argument(1, "mask"), call.argument(2, "value")
    features = call.features(x)
    if features is None or float(value) != 0:
        call.fix(x, reason="some values are filled in")
        return None
    return _coefficients(call, features, mask, "some features are masked")


@rule("where")
def where(call: Call) -> Any:
    """Tokens from one of two branches."""
    condition, *branches = call.args
    if len(branches) != 2:
        call.fix(*call.args, reason="passes through where")
        return None
    features = []
    for branch in branches:
        own = call.features(branch)
        if own is None and not call.is_zero(branch):
            call.fix(*branches, reason="some values are filled in")
            return None
        features.append(torch.full(getattr(branch, "shape", ()), NONE) if own is None else own)
    a, b = torch.broadcast_tensors(*features)
    call.facts.note_same(a, b)
    return _coefficients(call, torch.where(a == NONE, b, a), condition, "some features are masked")


@rule("masked_scatter")
def masked_scatter(call: Call) -> Any:
    """Rows of one tensor put among the rows of another: images among tokens."""
    x, mask, source = call.args
    fx, fs = call.features(x), call.features(source)
    if fx is None or fs is None or varies(fx) != [fx.dim() - 1] or varies(fs) != [fs.dim() - 1] or fx.shape[-1] != fs.shape[-1]:
        call.fix(x, source, reason="passes through masked_scatter")
        return None
    call.facts.note_same(compact(fx).flatten(), compact(fs).flatten())
    call.facts.note_flag(fx, "residual")
    return _coefficients(call, fx, mask, "some features are masked")


@rule("index_add", "index_copy")
def index_add(call: Call) -> Any:
    """Rows added to rows: experts put their tokens back."""
    x, source = call.args[0], call.argument(3, "source")
    fx, fs = call.features(x), call.features(source)
    if fs is None or varies(fs) != [fs.dim() - 1] or (fx is None and not call.is_zero(x)):
        call.fix(x, source, reason=f"passes through {call.name}")
        return None
    fs = compact(fs).reshape([1] * (call.output.dim() - 1) + [-1])
    if fx is not None:
        call.facts.note_same(fx, fs.expand(fx.shape))
    return (fs.expand(call.output.shape),)


@rule("mean", "sum", "cumsum")
def over_tokens(call: Call) -> Any:
    """A sum over tokens keeps the features; one over the features is no rotation's friend."""
    x = call.args[0]
    dims = call.argument(1, "dim", "axis")
    features = call.features(x)
    if features is None or dims is None:
        call.fix(x, reason=f"all values go through {call.name}")
        return None
    dims = [d % features.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if set(dims) & set(varies(features)):
        call.fix(x, reason=f"{call.name} over features")
        return None
    if call.name == "cumsum":
        return (features,)
    for dim in sorted(dims, reverse=True):
        features = features.narrow(dim, 0, 1) if call.output.dim() == features.dim() else features.select(dim, 0)
    return (features,)


@rule("relu", "leaky_relu")
def relu(call: Call) -> Any:
    """No rotation passes, a positive factor for each feature does."""
    features = call.features(call.argument(0, "input"))
    if features is None:
        return None
    call.facts.note_together(features, tuple(range(features.dim())), split=f"passes through {call.name}")
    return (features,)
