"""The fast direction against double backward, in float64."""

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig
from hf_teleport.ascent import evaluate, exact_direction, fast_direction, norm
from hf_teleport.audit import audit
from hf_teleport.subspace import Representation, null_space

from tiny_models import MODELS, build, loss_fn


def directions(model, loss_fn, batch, tau=1.0):
    """For each layer that may move: (fast, exact, projected), and its report, of one batch."""
    model.eval()
    point = evaluate(model, loss_fn, batch, seed=0, differentiable_gradients=True)
    layers, _ = audit(model, point, TeleportConfig())
    u = [None if g is None else g.detach() for g in point.gradients]
    fast = fast_direction(model, loss_fn, point, u, layers)
    exact = exact_direction(point, u, layers)
    projected = {}
    for layer in layers:
        representation = Representation()
        layer.represent(point.trace.uses[layer.weight][layer.region], representation)
        subspace = null_space(representation, tau)
        projected[layer.name] = (subspace.project(fast[layer]), subspace.project(exact[layer]), exact[layer], subspace)
    return projected


def assert_fast_is_exact(model, loss_fn, batch, minimum):
    """Within 1e-5 on every layer that has a direction. Returns the names of those layers, at least `minimum` of them."""
    compared = set()
    for name, (fast, exact, whole, subspace) in directions(model, loss_fn, batch).items():
        if exact.norm() <= 1e-8 * whole.norm():
            assert fast.norm() <= 1e-8 * whole.norm(), name
        elif subspace.null_dim:
            assert (fast - exact).norm() <= 1e-5 * exact.norm(), name
            compared.add(name)
    assert len(compared) >= minimum
    return compared


@pytest.mark.parametrize(
    ("name", "minimum"), [("gpt2", 8), ("llama", 14), ("bert", 13), ("t5", 30), ("vit", 13), ("resnet", 4), ("mamba", 5)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_fast_is_exact_on_transformers_models(name, minimum, seed):
    assert set(MODELS) >= {name}
    model, batch = build(name, seed=seed)
    assert_fast_is_exact(model, loss_fn, batch, minimum)


class Middle(nn.Module):
    """A layer to look at, with a trainable layer below and one above."""

    def __init__(self, layer, below, above):
        super().__init__()
        self.below, self.layer, self.above = below, layer, above

    def forward(self, x):
        return self.above(torch.tanh(self.layer(torch.tanh(self.below(x))))).square().mean()


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 8, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_fast_is_exact_on_convolutions(dims, options):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    below, above = conv(2, 8, 1), conv(8, 2, 1)
    layer = conv(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **options})
    side = {1: 7, 2: 5, 3: 5}[dims]
    # So few positions that patches have a null space; a constant image gives even a depthwise layer one.
    batch = torch.randn(1, 2, *[1] * dims).double().expand(1, 2, *[side] * dims).contiguous()
    assert "layer" in assert_fast_is_exact(Middle(layer, below, above).double(), lambda m, x: m(x), batch, minimum=1)


@pytest.mark.parametrize("bias", [True, False])
def test_fast_is_exact_on_linear(bias):
    model = Middle(nn.Linear(12, 12, bias=bias), nn.Linear(6, 12, bias=bias), nn.Linear(12, 3, bias=bias)).double()
    assert_fast_is_exact(model, lambda model, x: model(x), torch.randn(5, 6).double(), minimum=2)


def test_fast_is_exact_where_the_network_is_far_more_sensitive_than_its_weights_are_large():
    """A layer norm of a nearly constant stream, as in a DeiT at initialisation, multiplies a shift a millionfold."""

    class Sensitive(Middle):
        def __init__(self):
            super().__init__(nn.Linear(12, 12), nn.Linear(6, 12), nn.Linear(12, 3))
            self.token = nn.Parameter(1e-7 * torch.randn(12))
            self.norm = nn.LayerNorm(12, eps=1e-12)

        def forward(self, x):
            return super().forward(x) + self.above(self.layer(self.norm(self.token))).square().mean()

    assert_fast_is_exact(Sensitive().double(), lambda model, x: model(x), torch.randn(5, 6).double(), minimum=2)


def test_a_double_backward_leaves_the_kept_gradients_of_outputs_alone():
    model, batch = build("gpt2")
    model.eval()
    point = evaluate(model, loss_fn, batch, seed=0, differentiable_gradients=True)
    layers, _ = audit(model, point, TeleportConfig())
    u = [None if g is None else g.detach() for g in point.gradients]
    before = fast_direction(model, loss_fn, point, u, layers)
    exact_direction(point, u, layers)
    after = fast_direction(model, loss_fn, point, u, layers)
    assert all(torch.equal(before[layer], after[layer]) for layer in layers)


def test_first_layer_has_no_direction():
    model = Middle(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)).double()
    fast, exact, whole, subspace = directions(model, lambda model, x: model(x), torch.randn(5, 12).double())["below"]
    assert subspace.null_dim == 13 - 5
    assert fast.norm() == 0
    assert exact.norm() < 1e-12 * whole.norm()


def test_weights_and_gradients_are_untouched():
    model, batch = build("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    directions(model, loss_fn, batch)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_random_forwards_see_the_same_numbers():
    """A model that draws noise in eval mode: both forwards of the difference must draw the same."""

    class Noisy(Middle):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model = Noisy(nn.Linear(12, 12), nn.Linear(6, 12), nn.Linear(12, 3)).double()
    assert_fast_is_exact(model, lambda model, x: model(x), torch.randn(5, 6).double(), minimum=2)


@pytest.mark.parametrize("bad", [lambda m, x: m(x), lambda m, x: 1.0, lambda m, x: m(x).mean().detach()])
def test_a_loss_that_is_none(bad):
    with pytest.raises(ValueError, match="loss"):
        evaluate(nn.Linear(3, 2), bad, torch.randn(4, 3), seed=0)


def test_norm_skips_what_is_missing():
    assert norm([torch.tensor([3.0]), None, torch.tensor([[4.0]])]) == pytest.approx(5.0)
    assert norm([None]) == 0
