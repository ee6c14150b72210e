import torch
from torch import nn

from hf_teleport.layers import Layer
from hf_teleport.projectors.conv import Conv
from hf_teleport.projectors.linear import Linear, TransposedLinear
from hf_teleport.subspace import Representation
from hf_teleport.trace import Trace


def test_bias_is_one_more_column():
    module = nn.Linear(4, 3)
    layer = Layer("x", "linear", module.weight, module.bias, Linear())
    rows = layer.rows(torch.randn(5, 4))
    assert rows.shape == (1, 5, 5)
    assert (rows[..., -1] == 1).all()
    matrix = layer.matrix({module.weight: module.weight.detach(), module.bias: module.bias.detach()})
    torch.testing.assert_close(matrix[0, :, -1], module.bias.detach())
    torch.testing.assert_close(matrix[0, :, :-1], module.weight.detach())


def test_add_moves_weight_and_bias_in_place():
    for projector, shape in ((Linear(), (3, 4)), (TransposedLinear(), (4, 3))):
        weight, bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3))
        layer = Layer("x", "linear", weight, bias, projector)
        before = layer.matrix({weight: weight.detach().clone(), bias: bias.detach().clone()})
        move = torch.randn(1, 3, 5)
        layer.add_(move, 0.5)
        torch.testing.assert_close(layer.matrix({weight: weight.detach(), bias: bias.detach()}), before + 0.5 * move)


def test_grouped_convolution_bias_belongs_to_its_group():
    module = nn.Conv1d(4, 6, 3, groups=2)
    layer = Layer("x", "conv", module.weight, module.bias, Conv((3,), (1,), (0, 0), (1,), 2))
    x = torch.randn(2, 4, 9)
    matrix = layer.matrix({module.weight: module.weight.detach(), module.bias: module.bias.detach()})
    torch.testing.assert_close(layer.rows(x) @ matrix.mT, layer.projector.output_rows(module(x)).detach())


def test_represent_sees_every_row_of_every_use():
    module = nn.Conv2d(2, 3, 3)
    layer = Layer("x", "conv", module.weight, module.bias, Conv((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1))
    x = torch.randn(130, 2, 5, 5)
    with Trace(module.parameters()) as trace:
        module(x)
        module(x[:7])
    representation = Representation()
    layer.represent(trace.uses[module.weight], representation)
    assert representation.num_rows == 137 * 9
