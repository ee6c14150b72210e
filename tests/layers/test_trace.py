import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_teleport.layers.double import KeepDouble
from hf_teleport.layers.tangent import TangentTrace
from hf_teleport.layers.trace import Trace
from hf_teleport.weights.norms import norm_of
from hf_teleport.weights.region import Region


def test_records_input_weight_bias_and_gradient():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
    output.square().sum().backward()
    ((use,),) = trace.uses[layer.weight].values()
    assert use.call.input is x
    assert use.call.bias is layer.bias
    torch.testing.assert_close(use.output_gradient, 2 * output.detach())
    assert not trace.other_uses


def test_functional_uses_and_repeated_calls():
    weight = nn.Parameter(torch.randn(4, 4))
    with Trace([weight]) as trace:
        F.linear(F.linear(torch.randn(2, 4), weight), weight)
    ((first, second),) = trace.uses[weight].values()
    assert first is not second


def test_other_operations_are_named_and_getters_are_not_uses():
    weight = nn.Parameter(torch.randn(4, 4))
    with Trace([weight]) as trace:
        _ = weight.shape, weight.dtype, weight.device, weight.detach()
        weight.square().sum()
        torch.cdist(torch.randn(2, 4), weight)
    assert trace.other_uses == {weight: {"square", "cdist"}}


def test_in_place_operations_after_the_layer_do_not_confuse_its_gradient():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
        output.mul_(2)
    output.sum().backward()
    ((use,),) = trace.uses[layer.weight].values()
    torch.testing.assert_close(use.output_gradient, torch.full((5, 3), 2.0))


def test_other_parameters_are_not_followed():
    followed, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with Trace(followed.parameters()) as trace:
        other(followed(torch.randn(2, 4)))
    assert set(trace.uses) == {followed.weight}


def test_views_are_followed_to_their_part_of_the_parameter():
    weight = nn.Parameter(torch.randn(6, 4))
    x = torch.randn(2, 4)
    with Trace([weight]) as trace:
        top, bottom = weight.chunk(2)
        F.linear(x, top)
        x @ bottom.t()
        F.linear(x, weight.view(2, 3, 4)[1])
    assert not trace.other_uses
    regions = {region: len(uses) for region, uses in trace.uses[weight].items()}
    assert regions == {Region((3, 4), (4, 1), 0): 1, Region((4, 3), (1, 4), 12): 1, Region((3, 4), (4, 1), 12): 1}
    with torch.no_grad():
        Region((4, 3), (1, 4), 12).view(weight).zero_()
    assert torch.equal(weight[3:], torch.zeros(3, 4))


def test_inside_of_multi_head_attention_is_seen():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with Trace(attention.parameters()) as trace:
        attention(x, x, x)
    assert set(trace.uses) == {attention.in_proj_weight, attention.out_proj.weight}
    with Trace(attention.parameters()) as trace:
        attention(x, x + 1, x + 1)
    assert len(trace.uses[attention.in_proj_weight]) == 3


def test_tangent_product_by_hand_and_calls_that_do_not_match():
    layer = nn.Linear(4, 3)
    x, shift = torch.randn(5, 4), torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        output = layer(x)
    output.square().sum().backward()
    ((region, (use,)),) = trace.uses[layer.weight].items()
    with torch.no_grad(), TangentTrace(trace.uses, []) as tangent:
        layer(x + shift)
    product = tangent.products[layer.weight][region]
    torch.testing.assert_close(product, (use.output_gradient.T @ shift)[None], rtol=1e-4, atol=1e-5)
    for inputs in ([x[:3]], [x, x], [x[:3], x]):
        with torch.no_grad(), TangentTrace(trace.uses, []) as tangent:
            for input in inputs:
                layer(input)
        assert tangent.products[layer.weight][region] is None


def test_a_product_of_ones_own_is_summed_over_the_uses():
    layer = nn.Linear(4, 4)
    x, shift = torch.randn(5, 4), torch.randn(5, 4)
    with Trace(layer.parameters()) as trace:
        (layer(x) + layer(2 * x)).square().sum().backward()
    ((region, uses),) = trace.uses[layer.weight].items()
    seen = []

    def product(weight, part, use, moved, known):
        seen.append((weight is layer.weight, part == region, use))
        return moved.sum(0)

    with torch.no_grad(), TangentTrace(trace.uses, [], product) as tangent:
        layer(x + shift), layer(2 * x - 3 * shift)
    assert seen == [(True, True, use) for use in uses]
    torch.testing.assert_close(tangent.products[layer.weight][region], -2 * shift.sum(0), atol=1e-5, rtol=1e-4)
    squares = torch.stack([10 * shift.double().square().sum(), 5 * x.double().square().sum()])
    torch.testing.assert_close(tangent.squares[layer.weight][region], squares, rtol=1e-5, atol=0)


def test_weights_that_read_the_same_input_share_its_shift_and_what_is_made_of_it():
    first, second, other = (nn.Linear(4, 4) for _ in range(3))
    x, shift = torch.randn(5, 4), torch.randn(5, 4)
    layers = {layer.weight: layer for layer in (first, second, other)}
    with Trace(layers) as trace:
        (first(x) + second(x) + other(x.clone())).square().sum().backward()
    seen = []

    def product(weight, part, use, moved, known):
        seen.append((moved, len(known)))
        known[weight] = moved
        return moved.sum(0)

    with torch.no_grad(), TangentTrace(trace.uses, [], product):
        moved = x + shift
        first(moved), second(moved), other(moved.clone())
    assert seen[0][0] is seen[1][0]
    assert seen[2][0] is not seen[0][0]
    assert [count for _, count in seen] == [0, 1, 0]
    assert all(torch.equal(found, x + shift - x) for found, _ in seen)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(("width", "wide"), [(4, False), (9, True)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_wide_head_behind_which_nothing_is_awaited_makes_zeros(once, width, wide, transposed):
    below, head, behind = nn.Linear(4, 4), nn.Parameter(torch.randn(width, 4)), nn.Linear(width, 20)
    x, shift = torch.randn(5, 4), torch.randn(5, 4)

    def forward(x):
        hidden = torch.tanh(below(x))
        logits = hidden @ head.t() if transposed else F.linear(hidden, head)
        return logits, behind(logits)

    with Trace([below.weight, head]) as trace:
        forward(x)[0].square().sum().backward()
    with torch.no_grad(), TangentTrace(trace.uses, []) as plain:
        forward(x + shift)
    with torch.no_grad(), TangentTrace(trace.uses, [], once=[head] if once else []) as tangent:
        logits, last = forward(x + shift)
    for weight in (below.weight, head):
        assert torch.equal(*(next(iter(each.products[weight].values())) for each in (plain, tangent)))
    assert logits.shape == (5, width)
    assert bool(logits.any()) is not (once and wide)
    # Behind it nothing is awaited in either case.
    assert last.shape == (5, 20)
    assert not last.any()


def test_a_use_knows_whether_a_shift_of_the_weights_reaches_its_input():
    below, above = nn.Linear(4, 4), nn.Linear(4, 4)
    with Trace([*below.parameters(), *above.parameters()]) as trace:
        hidden = below(torch.randn(2, 4))
        above(hidden), above(hidden.detach())
    reached = [use.reached for layer in (below, above) for use in next(iter(trace.uses[layer.weight].values()))]
    assert reached == [False, True, False]


def test_gradients_of_another_backward_take_the_place_of_the_first():
    layer = nn.Linear(4, 3)
    with Trace(layer.parameters()) as trace:
        output = layer(torch.randn(5, 4))
    output.sum().backward(retain_graph=True)
    ((use,),) = trace.uses[layer.weight].values()
    (2 * output).sum().backward(retain_graph=True)
    assert (use.output_gradient == 1).all()
    trace.forget_gradients()
    assert use.output_gradient is None
    (2 * output).sum().backward()
    assert (use.output_gradient == 2).all()


def test_norm_of_is_that_of_float64():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128):
        for shape in ((), (0,), (3, 0), (0, 3), (7,), (20, 100), (2, 3, 5)):
            tensor = torch.randn(shape, dtype=dtype)
            exact = tensor.abs().double().square().sum().sqrt()
            assert norm_of(tensor).dtype == torch.float64
            torch.testing.assert_close(norm_of(tensor), exact, rtol=1e-6, atol=0)
            torch.testing.assert_close(norm_of(tensor.mT if tensor.dim() > 1 else tensor), exact, rtol=1e-6, atol=0)


def test_a_tangent_forward_makes_the_choices_of_the_first():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    shifted = torch.tensor([[1.0, 3.0, 4.0], [5.0, 7.0, 6.0]])
    with Trace([]) as trace:
        scores.topk(1)
        scores.argmax(-1)
    with TangentTrace({}, trace.choices):
        values, indices = torch.topk(shifted, 1, dim=-1)
        best = torch.argmax(input=shifted, dim=-1)
    assert indices.tolist() == [[1], [2]]
    assert values.tolist() == [[3.0], [6.0]]
    assert best.tolist() == [1, 2]


def test_keep_double_leaves_out_casts_of_float64_only():
    wide, narrow = torch.randn(3).double(), torch.randn(3).bfloat16()
    with KeepDouble():
        assert wide.float().dtype == torch.float64
        assert wide.to(torch.float32).dtype == torch.float64
        assert wide.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert narrow.float().dtype == torch.float32
        assert wide.to(torch.int64).dtype == torch.int64
        whole = torch.arange(3)[:, None]
        assert (torch.randn(2, 3).double().float() @ whole.float()).dtype == torch.float64
