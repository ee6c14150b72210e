"""Operations that move values about and change none: they do to the numbers of features what they do to values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_teleport.methods.basis.features import NONE, varies
from hf_teleport.methods.basis.follow import Call
from hf_teleport.methods.basis.rules.base import rule, why

_STRUCTURAL = (
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim t T mT unsqueeze squeeze expand broadcast_to "
    "getitem select narrow split split_with_sizes chunk tensor_split unbind repeat repeat_interleave tile roll flip index_select "
    "gather take_along_dim stack hstack view_as reshape_as expand_as diagonal unfold"
)
_UNCHANGED = (
    "to float double half bfloat16 type type_as contiguous clone detach data dropout alpha_dropout feature_dropout identity "
    "alias requires_grad cpu cuda native_dropout neg"
)
# New tensors like their operand; no value of it is in them.
_VALUE_FREE = "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor"


@rule(*_STRUCTURAL.split())
def structural(call: Call) -> Any:
    """The same operation on the numbers of the features."""
    if not _constants_are_zero(call):
        return None
    tags = [call.tag(t) for t in _flat(call.args)]
    entries = min(len(tag) for tag in tags if tag is not None)

    def features(value: Any, entry: int) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(features(v, entry) for v in value)
        tag = call.tag(value)
        if tag is not None:
            # Next to an activation a parameter (a class token) counts by its last axis.
            return tag[entry] if len(tag) == entries else call.features(value)
        is_operand = isinstance(value, Tensor) and value.is_floating_point()
        return torch.full(value.shape, NONE) if is_operand else value

    # The numbers need not lie in memory as the values do, and a view of them may have to be a copy.
    function = Tensor.reshape if call.name == "view" else call.function
    try:
        moved = [function(*(features(arg, i) for arg in call.args), **call.kwargs) for i in range(entries)]
    except (RuntimeError, TypeError):  # an operation for floating-point numbers only
        call.fix(*_flat(call.args), reason=f"passes through {call.name}")
        return None
    if isinstance(call.output, Tensor):
        return tuple(moved)
    return tuple(zip(*moved, strict=True))


@rule("cat", "concat", "concatenate", "vstack")
def concatenate(call: Call) -> Any:
    """Tokens beside tokens have the same features; features beside features stay what they are."""
    tensors, dim = call.args[0], 0 if call.name == "vstack" else call.argument(1, "dim", "axis", default=0)
    full = [t for t in tensors if t.numel()]
    if all(len(call.tag(t) or ()) > 1 for t in full):  # a weight put together of weights
        return structural(call)
    known = [f for f in (call.features(t) for t in full) if f is not None]
    if not known or any(dim % f.dim() in varies(f) or f.dim() != call.output.dim() for f in known):
        return structural(call)
    if not _constants_are_zero(call):
        return None
    first = known[0].narrow(dim, 0, 1)
    for other in known[1:]:
        call.facts.note_same(first, other.narrow(dim, 0, 1))
        call.facts.note_flag(first, "residual")
        first = torch.where(first == NONE, other.narrow(dim, 0, 1), first)
    return (first.expand(call.output.shape),)


def _flat(args: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for arg in args:
        flat += arg if isinstance(arg, (list, tuple)) else [arg]
    return flat


def _constants_are_zero(call: Call) -> bool:
    """Fix the features if a constant other than zero is put beside them."""
    operands = [t for t in _flat(call.args) if isinstance(t, Tensor) and t.is_floating_point()]
    constants = [t for t in operands if call.tag(t) is None]
    if not all(call.is_zero(t) for t in constants):
        call.fix(*operands, reason=why(call, constants, "is joined with values that no weight has written"))
        return False
    return True


@rule(*_UNCHANGED.split())
def unchanged(call: Call) -> Any:
    """Values, and features, as they were. A property of that name, `requires_grad`, has no values at all."""
    tag = call.tag(call.argument(0, "input"))
    return tag if isinstance(call.output, Tensor) else None


@rule(*_VALUE_FREE.split())
def value_free(call: Call) -> None:
    """Nothing of the features comes out."""
    call.tag(call.args[0])
