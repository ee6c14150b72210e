import torch
import torch.nn.functional as F
from torch import nn

from hf_teleport.trace import KeepDouble, TangentTrace, Trace


def test_records_input_weight_bias_and_gradient():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
    output.square().sum().backward()
    (use,) = trace.uses[layer.weight]
    assert use.call.input is x
    assert use.call.bias is layer.bias
    torch.testing.assert_close(use.output_gradient, 2 * output.detach())
    assert not trace.other_uses


def test_functional_uses_and_repeated_calls():
    weight = nn.Parameter(torch.randn(4, 4))
    with Trace([weight]) as trace:
        F.linear(F.linear(torch.randn(2, 4), weight), weight)
    assert len(trace.uses[weight]) == 2


def test_other_operations_are_named_and_getters_are_not_uses():
    weight = nn.Parameter(torch.randn(4, 4))
    with Trace([weight]) as trace:
        _ = weight.shape, weight.dtype, weight.device, weight.detach()
        weight.square().sum()
        torch.einsum("ij,kj->ik", torch.randn(2, 4), weight)
    assert trace.other_uses == {weight: {"square", "einsum"}}


def test_in_place_operations_after_the_layer_do_not_confuse_its_gradient():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
        output.mul_(2)
    output.sum().backward()
    torch.testing.assert_close(trace.uses[layer.weight][0].output_gradient, torch.full((5, 3), 2.0))


def test_other_parameters_are_not_followed():
    followed, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with Trace(followed.parameters()) as trace:
        other(followed(torch.randn(2, 4)))
    assert set(trace.uses) == {followed.weight}


def test_tangent_product_by_hand_and_calls_that_do_not_match():
    layer = nn.Linear(4, 3)
    x, shift = torch.randn(5, 4), torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
    output.square().sum().backward()
    gradient = trace.uses[layer.weight][0].output_gradient
    with torch.no_grad(), TangentTrace(trace.uses) as tangent:
        layer(x + shift)
    torch.testing.assert_close(tangent.products()[layer.weight], (gradient.T @ shift)[None], rtol=1e-4, atol=1e-5)
    for inputs in ([x[:3]], [x, x]):
        with torch.no_grad(), TangentTrace(trace.uses) as tangent:
            for input in inputs:
                layer(input)
        assert tangent.products() == {}


def test_keep_double_leaves_out_casts_of_float64_only():
    wide, narrow = torch.randn(3).double(), torch.randn(3).bfloat16()
    with KeepDouble():
        assert wide.float().dtype == torch.float64
        assert wide.to(torch.float32).dtype == torch.float64
        assert wide.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert narrow.float().dtype == torch.float32
        assert wide.to(torch.int64).dtype == torch.int64
