import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_teleport.layers.layer import Layer, laid_out_like
from hf_teleport.layers.subspace import Representation, null_space
from hf_teleport.layers.trace import Trace, Use
from hf_teleport.projectors import Call
from hf_teleport.projectors.conv import Conv
from hf_teleport.projectors.linear import Linear, TransposedLinear
from hf_teleport.projectors.products import BatchedProduct, GroupedProduct
from hf_teleport.weights.region import Region


def layer_of(weight, bias, projector):
    return Layer("x", projector.role, weight, Region.of(weight, weight), bias, projector)


def test_bias_is_one_more_column():
    module = nn.Linear(4, 3)
    layer = layer_of(module.weight, module.bias, Linear())
    rows = layer.rows(layer.projector, torch.randn(5, 4))
    assert rows.shape == (1, 5, 5)
    assert (rows[..., -1] == 1).all()
    matrix = layer.matrix({module.weight: module.weight.detach(), module.bias: module.bias.detach()})
    torch.testing.assert_close(matrix[0, :, -1], module.bias.detach())
    torch.testing.assert_close(matrix[0, :, :-1], module.weight.detach())


def test_add_moves_weight_and_bias_in_place():
    for projector, shape in ((Linear(), (3, 4)), (TransposedLinear(), (4, 3))):
        weight, bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3))
        layer = layer_of(weight, bias, projector)
        before = layer.matrix({weight: weight.detach().clone(), bias: bias.detach().clone()})
        move = torch.randn(1, 3, 5)
        layer.add_(move, 0.5)
        torch.testing.assert_close(layer.matrix({weight: weight.detach(), bias: bias.detach()}), before + 0.5 * move)


def test_grouped_convolution_bias_belongs_to_its_group():
    module = nn.Conv1d(4, 6, 3, groups=2)
    layer = layer_of(module.weight, module.bias, Conv((3,), (1,), (0, 0), (1,), 2))
    x = torch.randn(2, 4, 9)
    matrix = layer.matrix({module.weight: module.weight.detach(), module.bias: module.bias.detach()})
    torch.testing.assert_close(layer.rows(layer.projector, x) @ matrix.mT, layer.projector.output_rows(module(x)).detach())


def test_represent_sees_every_row_of_every_use():
    module = nn.Conv2d(2, 3, 3)
    layer = layer_of(module.weight, module.bias, Conv((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1))
    x = torch.randn(130, 2, 5, 5)
    with Trace(module.parameters()) as trace:
        module(x)
        module(x[:7])
    representation = Representation()
    layer.represent(trace.uses[module.weight][layer.region], representation)
    assert representation.num_rows == 137 * 9


def test_a_region_moves_alone():
    weight = nn.Parameter(torch.randn(6, 4))
    before = weight.detach().clone()
    middle = weight.detach()[2:4]
    layer = Layer("x", "qkv", weight, Region.of(middle, weight), None, Linear())
    layer.add_(torch.ones(1, 2, 4), 1.0)
    assert torch.equal(weight[2:4], before[2:4] + 1)
    assert torch.equal(weight[:2], before[:2])
    assert torch.equal(weight[4:], before[4:])
    gradient = torch.arange(24.0).reshape(4, 6).t()
    assert torch.equal(layer.matrix({weight: gradient})[0], gradient[2:4])
    assert laid_out_like(weight, gradient).stride() == weight.stride()


# The tangent and its projection, in whichever order is cheaper.


def used(layer, input, output_shape):
    """One use of a layer with a random D, and what its input's null space is found from."""
    use = Use(Call(layer.projector, input, layer.weight, layer.bias), torch.randn(output_shape, dtype=input.dtype))
    representation = Representation()
    layer.represent([use], representation)
    return use, representation


def assert_tangent_is_dense(layer, use, representation, tau):
    """`Dᵀ Ẋ` and `Dᵀ Ẋ P` against rows of D and of Ẋ, with a 0 for the bias, multiplied out."""
    shift = torch.randn_like(use.call.input)
    rows = layer.projector.rows(shift)
    if layer.bias is not None:
        rows = torch.cat([rows, torch.zeros_like(rows[..., :1])], dim=-1)
    product = layer.projector.output_rows(use.output_gradient).mT @ rows
    torch.testing.assert_close(layer.tangent(use, shift), product, rtol=1e-10, atol=1e-10)
    subspace = null_space(representation, tau)
    width = subspace.basis.shape[1]
    projection = subspace.project(torch.eye(width, dtype=shift.dtype).expand(len(subspace.basis), -1, -1))
    torch.testing.assert_close(layer.tangent(use, shift, subspace), product @ projection, rtol=1e-10, atol=1e-10)


SIZES = {"num_rows": st.integers(1, 12), "o": st.integers(1, 12), "d": st.integers(1, 12), "tau": st.floats(0.3, 1)}


@given(**SIZES, bias=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 99))
def test_tangent_projects_rows_as_it_does_products(num_rows, o, d, tau, bias, transposed, seed):
    torch.manual_seed(seed)
    projector, shape = (TransposedLinear(), (d, o)) if transposed else (Linear(), (o, d))
    weight = nn.Parameter(torch.randn(shape).double())
    layer = layer_of(weight, nn.Parameter(torch.randn(o).double()) if bias else None, projector)
    assert_tangent_is_dense(layer, *used(layer, torch.randn(num_rows, 1, d).double(), (num_rows, 1, o)), tau)


@given(**SIZES, groups=st.integers(1, 3), sorted_by_expert=st.booleans(), seed=st.integers(0, 99))
def test_tangent_of_stacked_weights(num_rows, o, d, tau, groups, sorted_by_expert, seed):
    torch.manual_seed(seed)
    layer = layer_of(nn.Parameter(torch.randn(groups, d, o).double()), None, BatchedProduct())
    shape = (groups, num_rows)
    if sorted_by_expert:
        # The first expert gets one row, the last those that are left.
        shape = (groups + num_rows,)
        layer = layer_of(layer.weight, None, GroupedProduct((*range(1, groups), groups + num_rows)))
    assert_tangent_is_dense(layer, *used(layer, torch.randn(*shape, d).double(), (*shape, o)), tau)


@given(tau=SIZES["tau"], groups=st.sampled_from([1, 2, 4]), bias=st.booleans(), side=st.integers(3, 5), seed=st.integers(0, 99))
def test_tangent_of_convolutions(tau, groups, bias, side, seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias).double()
    layer = layer_of(module.weight, module.bias, Conv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups))
    assert_tangent_is_dense(layer, *used(layer, torch.randn(1, 4, side, side).double(), (1, 8, side, side)), tau)


def test_a_use_without_its_gradient_has_no_tangent():
    module = nn.Linear(4, 3)
    layer = layer_of(module.weight, module.bias, Linear())
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="backward pass has not come to this use of x"):
        layer.tangent(Use(Call(layer.projector, x, module.weight, module.bias)), x)
