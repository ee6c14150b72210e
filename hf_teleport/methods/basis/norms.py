"""Recognise norms: torch's norms by their operation, and handwritten norms by what they compute."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.methods.basis.features import NONE, Facts, Norm, compact
from hf_teleport.methods.basis.follow import Follow

# Root mean square of the rows that a module is tried on.
_LONG = 1e3


@contextmanager
def recognised_norms(model: nn.Module, follow: Follow) -> Iterator[None]:
    """Take a module for an RMS norm if its output is one, however it is written, while the context is open."""
    marks: dict[nn.Module, tuple[int, ...]] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        marks[module] = follow.facts.mark()

    def after(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            _recognise(follow, module, inputs, named, output, marks.pop(module))

    with ExitStack() as stack:
        for module in model.modules():
            if _may_be_norm(module):
                stack.callback(module.register_forward_pre_hook(before).remove)
                # Must run first: if FSDP2 shards a norm by itself, the next hook takes away its weight.
                stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        yield


def _recognise(follow: Follow, module: nn.Module, inputs: Any, named: Any, output: Any, mark: tuple[int, ...]) -> None:
    x = inputs[0] if inputs else None
    tag = follow.tag(x)
    if tag is None or not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape:
        return
    gain = next(module.parameters(recurse=False), None)
    # The rows are so long that no epsilon counts. Longer ones follow, because a norm ignores a factor. Otherwise anything that
    # scales would pass for a norm if its rows happen to have length one.
    long = x * (_LONG / x.square().mean(-1, keepdim=True).sqrt()).nan_to_num(0, 0, 0)
    normed, again = (module.forward(scaled, *inputs[1:], **named) for scaled in (long, 16 * long))
    offset = rms_offset(long, normed, gain)
    if offset is None or not torch.allclose(again, normed, rtol=1e-3, atol=1e-5):
        return
    follow.facts.forget_since(mark)
    follow.reasons.pop(output, None)
    follow.give(output, (note_norm(follow.facts, tag[-1], gain, None, offset),))


def note_norm(facts: Facts, x: Tensor, gain: nn.Parameter | None, bias: nn.Parameter | None, offset: float) -> Tensor:
    """Note a norm over the last dim of features x (..., d), and return the features of its output."""
    ids = compact(x)
    shared = tuple(dim for dim, size in enumerate(ids.shape[:-1]) if size > 1)
    facts.note_together(ids, shared)
    facts.note_flag(ids, "normed")
    if bool((ids == NONE).any()) or (shared and bias is not None):
        facts.note_fixed(
            ids, "normalised together with zeros" if bias is None or not shared else "each head is shifted by the same bias"
        )
        return torch.full_like(x, NONE)
    if gain is None:
        return x
    if shared:  # one gain for each head: it has no features of its own
        facts.factors.append((gain, ids))
        return x
    own = facts.axis(gain, 0).features
    if bias is not None:
        facts.note_same(facts.axis(bias, 0).features, own)
        facts.writes.add((bias, 0))
    facts.norms.append(Norm(gain, bias, offset, ids.flatten(), own))
    return own.expand(x.shape)


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
        x, y: input and output, (..., d). The epsilon is what remains of `rms`, and must be the same for all rows.
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
