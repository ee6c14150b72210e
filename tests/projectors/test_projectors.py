"""Each family's matrix view against dense ground truth: the operation itself, and autograd's gradient of the weight."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.trace import Trace
from hf_teleport.projectors import Call, Projector, projectors_for, register
from hf_teleport.projectors import base as registry
from hf_teleport.weights.region import Region


def follow(module, input):
    """The module's one use of its weight, and its output."""
    with Trace(module.parameters()) as trace:
        output = module(input)
    ((use,),) = trace.uses[module.weight].values()
    return use, output


def check(module, input):
    """`output = from_rows(rows @ matrixᵀ + bias)` and `Dᵀ X` = autograd's gradient, for one module."""
    use, output = follow(module, input)
    projector = use.call.projector
    weight = use.call.weight.detach()
    rows, matrix = projector.rows(use.call.input), projector.to_matrix(weight)
    expected = rows @ matrix.mT
    if module.bias is not None:
        assert use.call.bias is module.bias
        expected = expected + module.bias.reshape(matrix.shape[0], 1, -1)
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if output.dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(projector.output_rows(output), expected, **tolerance)

    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, module.weight, upstream)
    found = projector.weight_gradient(use.call.input.detach(), upstream, tuple(weight.shape))
    region = Region.of(use.call.weight, module.weight)
    torch.testing.assert_close(found, projector.to_matrix(region.view(gradient.contiguous())), **tolerance)
    by_rows = projector.output_rows(upstream).mT @ rows
    torch.testing.assert_close(found, by_rows, **tolerance)
    torch.testing.assert_close(projector.from_matrix(matrix, tuple(weight.shape)), weight)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    check(nn.Linear(5, 3, bias=bias).double(), torch.randn(shape).double())


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_transformers_conv1d(shape):
    check(Conv1D(3, 5).double(), torch.randn(shape).double())


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 4, "padding": 1},
    "depthwise with multiplier": {"groups": 4, "out_channels": 8},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
    "no bias": {"bias": False},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolutions(dims, options):
    module_class = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    module = module_class(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}).double()
    check(module, torch.randn(2, 4, *[7, 6, 5][:dims]).double())


def test_convolution_of_one_sample_without_a_batch_dimension():
    check(nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(2, 6, 5).double())


def test_convolution_with_sides_of_its_own():
    module = nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    check(module, torch.randn(2, 2, 7, 6).double())


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_convolutions_of_any_shape(kernel, stride, padding, dilation, groups):
    module = nn.Conv2d(4, 2, kernel, stride, padding, dilation, groups).double()
    check(module, torch.randn(2, 4, 8, 7).double())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "output_padding": 1}, {"padding": 1, "dilation": 2}, {"groups": 2, "stride": 2, "padding": 1}],
)
def test_transposed_convolutions(dims, options):
    module = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1](4, 6, 3, bias=False, **options).double()
    input = torch.randn(2, 4, *[5, 4, 3][:dims]).double()
    use, output = follow(module, input)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, module.weight, upstream)
    projector = use.call.projector
    found = projector.weight_gradient(input, upstream, tuple(module.weight.shape))
    torch.testing.assert_close(found, projector.to_matrix(gradient), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        projector.from_matrix(projector.to_matrix(module.weight), tuple(module.weight.shape)), module.weight
    )


class Product(nn.Module):
    """A bare weight in some product with the input."""

    def __init__(self, product, *shape):
        super().__init__()
        self.weight, self.bias, self.product = nn.Parameter(torch.randn(*shape).double()), None, product

    def forward(self, x):
        return self.product(x, self.weight)


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)

PRODUCTS = {
    "x @ W": (lambda x, w: x @ w, (4, 5), (5, 3)),
    "x @ W, sequence": (lambda x, w: torch.matmul(x, w), (2, 4, 5), (5, 3)),
    "W @ x": (lambda x, w: w @ x, (5, 4), (3, 5)),
    "W @ x, batch": (lambda x, w: torch.matmul(w, x), (2, 5, 4), (3, 5)),
    "bmm": (torch.bmm, (3, 4, 5), (3, 5, 2)),
    "batched @": (lambda x, w: x @ w, (3, 4, 5), (3, 5, 2)),
    "grouped": (lambda x, w: F.grouped_mm(x, w, offs=ENDS), (5, 8), (3, 8, 4)),
    "grouped, stored (o, d)": (lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS), (5, 8), (3, 4, 8)),
    "einsum linear": (lambda x, w: torch.einsum("bnd,od->bno", x, w), (2, 3, 4), (5, 4)),
    "einsum heads": (lambda x, w: torch.einsum("ibh,hnd->ibnd", x, w), (2, 3, 4), (4, 2, 5)),
    "einsum out of heads": (lambda x, w: torch.einsum("ibnd,hnd->ibh", x, w), (2, 3, 4, 5), (6, 4, 5)),
    "einsum groups": (lambda x, w: torch.einsum("bgd,gdo->bgo", x, w), (2, 3, 4), (3, 4, 5)),
    "einsum weight first": (lambda x, w: torch.einsum("od,bd->bo", w, x), (2, 4), (5, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    product, input, weight = PRODUCTS[name]
    # There is no grouped product in float64.
    dtype = torch.float32 if name.startswith("grouped") else torch.float64
    check(Product(product, *weight).to(dtype), torch.randn(*input, dtype=dtype))


@pytest.mark.parametrize("equation", ["bi,ij->b", "...d,od->...o", "bd,dd->b"])
def test_einsums_that_are_no_matrix_product_of_rows_are_left(equation):
    weight = nn.Parameter(torch.randn(4, 4))
    with Trace([weight]) as trace:
        torch.einsum(equation, torch.randn(2, 4), weight)
    assert trace.other_uses == {weight: {"einsum"}}


def test_bilinear():
    module = nn.Bilinear(3, 4, 2).double()
    first, second = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    with Trace(module.parameters()) as trace:
        output = module(first, second)
    ((use,),) = trace.uses[module.weight].values()
    projector = use.call.projector
    expected = projector.rows(use.call.input) @ projector.to_matrix(module.weight).mT + module.bias
    torch.testing.assert_close(projector.output_rows(output), expected)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, module.weight, upstream)
    found = projector.weight_gradient(use.call.input, upstream, tuple(module.weight.shape))
    torch.testing.assert_close(found, projector.to_matrix(gradient))


def test_uses_that_a_family_does_not_cover_are_not_bound():
    weight = torch.randn(5, 3)
    (family,) = projectors_for(torch.addmm)
    assert family.bind(torch.randn(3), torch.randn(2, 5), weight, beta=2) is None
    assert family.bind(torch.randn(2, 5), torch.randn(4, 5, 3)) is None
    assert family.bind(torch.randn(2, 5), weight) is not None
    assert family.bind(input=torch.randn(2, 5), other=weight) is None


def scaled_product(input, weight):
    """A layer that no built-in family covers: the weight is used transposed and squared off by a scale."""
    if torch.overrides.has_torch_function((input, weight)):
        return torch.overrides.handle_torch_function(scaled_product, (input, weight), input, weight)
    return 3.0 * (input @ weight.t())


class ScaledLayer(nn.Module):
    def __init__(self, d, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, d) / d**0.5)

    def forward(self, input):
        return scaled_product(input, self.weight)


def test_a_user_can_add_a_family(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), ScaledLayer(16, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    batch = torch.randn(4, 8).double()

    def teleport():
        report = Teleporter(model, TeleportConfig()).teleport([batch], lambda model, x: model(x).square().mean())
        return next(layer for layer in report.layers if layer.name == "2")

    assert "scaled_product" in teleport().reason

    @register(scaled_product)
    @dataclasses.dataclass(frozen=True)
    class Scaled(Projector):
        @classmethod
        def bind(cls, input, weight):
            return Call(cls(), input, weight, None)

        def rows(self, input):
            return 3.0 * input.reshape(1, -1, input.shape[-1])

        def output_rows(self, output):
            return output.reshape(1, -1, output.shape[-1])

        def to_matrix(self, weight):
            return weight.unsqueeze(0)

        def from_matrix(self, matrix, shape):
            return matrix.reshape(shape)

    assert teleport().moved


def test_a_wrong_family_is_caught_by_the_audit(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register(scaled_product)
    class Unscaled(projectors_for(F.linear)[0]):
        @classmethod
        def bind(cls, input, weight):
            return Call(cls(), input, weight, None)

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), ScaledLayer(16, 16), nn.Linear(16, 2)).double()
    batch = torch.randn(4, 8).double()
    report = Teleporter(model, TeleportConfig()).teleport([batch], lambda model, x: model(x).square().mean())
    layer = next(layer for layer in report.layers if layer.name == "2")
    assert not layer.moved
    assert layer.reason.startswith("audit")
