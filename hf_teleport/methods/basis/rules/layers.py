"""Layers: what multiplies features with a weight, looks them up, or normalises them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_teleport.methods.basis.features import compact, varies
from hf_teleport.methods.basis.follow import Call, Tag
from hf_teleport.methods.basis.norms import note_norm
from hf_teleport.methods.basis.rules.base import rule, why


def _along(tag: Tag, shape: Sequence[int], dim: int) -> Tensor | None:
    """The features (size,) that a weight or a view of one has along one of its dims alone."""
    dim %= len(shape)
    for features in tag:
        if varies(features) == [dim] or (shape[dim] == 1 and not varies(features)):
            return compact(features).flatten()
    return None


def layer(call: Call, x: Any, weight: Tensor, bias: Any, dims: tuple[int, int], channel: int) -> Any:
    """`y = x W + b`: the weight reads the features of x and writes those of y.

    Args:
        dims: the weight's dims for output and input.
        channel: the dim of x and y in which their features lie.
    """
    tag = call.tag(weight)
    outputs = None if tag is None else _along(tag, weight.shape, dims[0])
    inputs = None if tag is None else _along(tag, weight.shape, dims[1])
    if tag is None or len(tag) < 2 or outputs is None or inputs is None:
        call.fix(x, weight, bias, reason="multiplied with a weight that is computed")
        return None
    facts = call.facts
    _note_side(call, inputs, facts.reads)
    _note_side(call, outputs, facts.writes)
    features = call.features(x)
    if features is None:
        facts.note_fixed(inputs, why(call, [x], "reads the model's inputs"))
    elif features.shape[channel] != len(inputs):
        call.fix(x, reason="read in groups")
        facts.note_fixed(inputs, "read in groups")
    else:
        shape = [1] * features.dim()
        shape[channel] = -1
        facts.note_same(features, inputs.reshape(shape))
        facts.note_together(inputs)
    facts.note_together(outputs)
    if isinstance(bias, Tensor):
        own = call.tag(bias)
        if own is None or len(varies(own[-1])) > 1:
            facts.note_fixed(outputs, "its bias is computed")
        else:
            written = compact(own[-1]).flatten()
            facts.note_same(written, outputs)
            _note_side(call, written, facts.writes)
    shape = [1] * call.output.dim()
    shape[channel] = -1
    return (outputs.reshape(shape).expand(call.output.shape),)


def _note_side(call: Call, features: Tensor, sides: set[tuple[nn.Parameter, int]]) -> None:
    """Put the axis that has these features among those that write, or those that read."""
    for key, axis in call.facts.axes.items():
        if axis.first <= int(features[0]) < axis.first + axis.size:
            sides.add(key)
            return


@rule("linear")
def linear(call: Call) -> Any:
    """`x Wᵀ + b`."""
    return layer(call, call.args[0], call.argument(1, "weight"), call.argument(2, "bias"), (0, 1), -1)


@rule("addmm")
def addmm(call: Call) -> Any:
    """`b + x W`: GPT-2's layers."""
    bias, x, weight = call.args[0], call.argument(1, "mat1"), call.argument(2, "mat2")
    return layer(call, x, weight, bias, (1, 0), -1)


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Any:
    """Channels are features; a patch embedding writes the stream by a convolution."""
    x, weight = call.args[0], call.argument(1, "weight")
    if call.argument(6, "groups", default=1) != 1:
        call.fix(x, weight, call.argument(2, "bias"), reason="read in groups")
        return None
    spatial = weight.dim() - 2
    return layer(call, x, weight, call.argument(2, "bias"), (0, 1), -1 - spatial)


@rule("embedding")
def embedding(call: Call) -> Any:
    """A row for each token: the table writes its columns' features."""
    weight = call.argument(1, "weight")
    tag = call.tag(weight)
    features = None if tag is None or len(tag) < 2 else _along(tag, weight.shape, -1)
    if tag is None or features is None:
        call.fix(weight, reason="an embedding that is computed")
        return None
    call.facts.note_fixed(tag[0], "looked up by token")
    call.facts.note_together(features)
    _note_side(call, features, call.facts.writes)
    return (features.expand(call.output.shape),)


@rule("layer_norm")
def layer_norm(call: Call) -> Any:
    """Subtract the mean, divide by the norm, multiply by the gain, add the bias."""
    x, shape = call.args[0], call.argument(1, "normalized_shape")
    return _norm(call, x, shape, call.argument(2, "weight"), call.argument(3, "bias"), centred=True)


@rule("rms_norm")
def rms_norm(call: Call) -> Any:
    """Divide by the norm, multiply by the gain."""
    return _norm(call, call.args[0], call.argument(1, "normalized_shape"), call.argument(2, "weight"), None, centred=False)


def _norm(call: Call, x: Any, shape: Any, gain: Any, bias: Any, *, centred: bool) -> Any:
    features = call.features(x)
    gains = [None if call.tag(p) is None else call.follow.parameter(p) for p in (gain, bias)]
    computed = any(p is not None and own is None for p, own in zip((gain, bias), gains, strict=True))
    if features is None or len(shape) != 1 or computed or (gains[0] is None and gains[1] is not None):
        call.fix(x, gain, bias, reason=why(call, [x], f"passes through {call.name}"))
        return None
    if centred:
        call.facts.note_flag(features, "centred")
    return (note_norm(call.facts, features, gains[0], gains[1], 0.0),)
