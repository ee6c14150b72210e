import torch
from torch import nn

from hf_teleport.layers import Layer, laid_out_like
from hf_teleport.projectors.conv import Conv
from hf_teleport.projectors.linear import Linear, TransposedLinear
from hf_teleport.subspace import Representation
from hf_teleport.trace import Region, Trace


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
