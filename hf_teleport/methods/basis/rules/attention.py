"""Products of two activations, attention's scores and its mixing of values; and with a weight by the same operations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_teleport.methods.basis.features import compact
from hf_teleport.methods.basis.follow import Call
from hf_teleport.methods.basis.rules.base import rule
from hf_teleport.methods.basis.rules.layers import layer


@rule("matmul", "bmm", "mm", "rmatmul", "mv")
def matmul(call: Call) -> Any:
    """`a b`: a layer if one is a weight; attention's scores if both have features, its mixing of values if one has."""
    a, b = call.args[0], call.argument(1, "mat2", "other")
    if call.name == "rmatmul":
        a, b = b, a
    return _product(call, a, b)


@rule("baddbmm")
def baddbmm(call: Call) -> Any:
    """`c + a b`: scores with a bias on positions."""
    offset, a, b = call.args[0], call.argument(1, "batch1"), call.argument(2, "batch2")
    features = _product(call, a, b)
    if features is not None and call.kwargs.get("beta", 1) != 0 and not call.is_zero(offset):
        call.fix(a, b, reason="a constant is added")
        return None
    return features


@rule("grouped_mm", "_grouped_mm")
def grouped_mm(call: Call) -> Any:
    """Each expert multiplies its own rows."""
    return _product(call, call.args[0], call.argument(1, "mat2"))


def _product(call: Call, a: Tensor, b: Tensor) -> Any:
    ta, tb = call.tag(a), call.tag(b)
    if tb is not None and len(tb) > 1:
        return layer(call, a, b, None, (-1, -2), -1)
    if ta is not None and len(ta) > 1:
        return layer(call, b, a, None, (-2, -1), -2)
    if a.dim() < 2 or b.dim() < 2:
        call.fix(a, b, reason=f"passes through {call.name}")
        return None
    if ta is not None and tb is not None:
        return _contract(call, ta[-1], tb[-1].transpose(-1, -2))
    if tb is not None:
        return _mix(call, tb[-1], -2, call.output.shape)
    return _mix(call, ta[-1] if ta else None, -1, call.output.shape)


def _contract(call: Call, a: Tensor, b: Tensor) -> None:
    """`a bᵀ` over features, (..., n, k) and (..., m, k): both sides turn alike and the scores stay."""
    a, b = compact(a), compact(b)
    if a.shape[-2] > 1 or b.shape[-2] > 1 or a.shape[-1] != b.shape[-1]:
        for features in (a, b):
            call.facts.note_fixed(features, f"two sets of features meet in {call.name}")
        return
    a, b = torch.broadcast_tensors(a, b)
    call.facts.note_same(a, b)
    for features in (a, b):
        call.facts.note_together(features, tuple(range(features.dim() - 1)))
        call.facts.note_flag(features, "contracted")


def _mix(call: Call, values: Tensor | None, tokens: int, shape: Sequence[int]) -> Any:
    """Rows of values, averaged over tokens. Each head has its own weights."""
    if values is None:
        return None
    values = compact(values)
    if values.shape[tokens] > 1:
        call.facts.note_fixed(values, f"features are multiplied with a matrix that is no weight, in {call.name}")
        return None
    call.facts.note_together(values, tuple(range(values.dim() - 2)))
    call.facts.note_flag(values, "mixed")
    return (values.expand(shape),)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """softmax(q kᵀ) v."""
    q, k, v = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    fq, fk, fv = (call.features(t) for t in (q, k, v))
    if call.kwargs.get("enable_gqa") and q.dim() > 3:
        repeats = q.shape[-3] // k.shape[-3]
        fk, fv = (None if f is None else f.repeat_interleave(repeats, -3) for f in (fk, fv))
    if fq is not None and fk is not None:
        _contract(call, fq, fk)
    else:
        call.fix(q, k, reason="attention scores with something that no weight has written")
    return _mix(call, fv, -2, call.output.shape)
