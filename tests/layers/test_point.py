"""The fast direction against double backward, and a second backward against a new forward, in float64."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_teleport import TeleportConfig
from hf_teleport.layers.audit import audit
from hf_teleport.layers.point import evaluate, evaluate_again
from hf_teleport.layers.subspace import Representation, null_space
from hf_teleport.methods import NullSpace
from hf_teleport.methods.null_space.direction import ShiftLength, exact_direction, fast_direction
from hf_teleport.weights.isolation import evaluation_mode, plain_execution
from hf_teleport.weights.norms import norm

from tiny_models import MODELS, VOCAB, build, loss_fn


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


class Calls(TorchFunctionMode):
    """Counts the forwards without gradients, by their embeddings, and the heads in them."""

    forwards = heads = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():
            self.forwards += func is F.embedding
            self.heads += func is F.linear and output.shape[-1] == 97
        return output


@pytest.mark.parametrize("tied", [True, False])
def test_fast_is_exact_below_and_in_a_wide_head_which_a_shifted_forward_leaves_out(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=97, tie_word_embeddings=tied)).double()
    ids = torch.randint(97, (2, 6))
    with Calls() as calls:
        compared = assert_fast_is_exact(model, loss_fn, {"input_ids": ids, "labels": ids}, 14)
    assert ("lm_head" in compared) is not tied
    # Of the two forwards of a central difference the first runs to its end.
    assert calls.forwards == 2 * calls.heads > 0


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


def test_what_no_trained_weight_lies_below_is_left_where_it_is_bit_for_bit():
    model = Middle(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    found, _ = projected(model, lambda model, x: model(x), torch.randn(5, 12))
    assert found["below"].shape == (1, 12, 13)
    assert not found["below"].any()
    assert found["layer"].any()


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


@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e-30, 1e-20, 1e-12, 1.0, 1e15, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_norm_is_that_of_float64_at_any_scale(dtype, scale):
    tensors = [
        (scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in [(), (0,), (3, 0), (7,), (40, 300), (2, 3, 5)]
    ]
    exact = sum(float(t.abs().double().square().sum()) for t in tensors) ** 0.5
    assert norm(tensors) == pytest.approx(exact, rel=1e-6)
    assert norm([tensors[0]]) == pytest.approx(float(tensors[0].abs()), rel=1e-6)


def test_norm_of_what_is_not_finite_is_not_finite():
    assert norm([torch.ones(3), torch.tensor([torch.inf])]) == torch.inf
    assert norm([torch.tensor([torch.nan, 1.0])]) != norm([torch.tensor([torch.nan, 1.0])])


@pytest.mark.parametrize("scale", [1e-14, 1e-10, 1.0, 1e10, 1e16])
def test_a_float32_direction_has_the_same_digits_at_any_scale_of_the_loss(scale):
    """The gradient of a model that is trained out is tiny, and the squares of what comes of it are tinier."""
    model = Middle(nn.Linear(12, 12), nn.Linear(6, 12), nn.Linear(12, 3))
    batch = torch.randn(5, 6)
    (found, layers), (plain, _) = (projected(model, lambda m, x, by=by: by * m(x), batch) for by in (scale, 1.0))
    for layer, other in zip(found.values(), plain.values(), strict=True):
        torch.testing.assert_close(layer.double() / scale**2, other.double(), rtol=1e-3, atol=1e-5 * float(other.norm()))
    assert norm(found.values()) == pytest.approx(scale**2 * norm(plain.values()), rel=1e-3)
    assert all(report.movable for report in layers.values())


def projected(model, loss_fn, batch, **options):
    """The directions of all layers, each in its null space, and the reports."""
    point = evaluate(model, loss_fn, batch, seed=0)
    layers, reports = audit(model, point, TeleportConfig())
    subspaces = {}
    for layer in layers:
        representation = Representation()
        layer.represent(point.trace.uses[layer.weight][layer.region], representation)
        subspaces[layer] = null_space(representation, 1.0, layer.weight.dtype)
    if options.pop("follow", False):
        followed = [layer for layer in layers if layer.weight is not layers[0].weight]
        point = evaluate(model, loss_fn, batch, seed=0, keep_graph=True, follow=[layer.weight for layer in followed])
        assert set(point.trace.uses) == {layer.weight for layer in followed}
        layers = followed
    found = fast_direction(model, loss_fn, point, point.gradients, layers, subspaces, **options)
    return {layer.name: value for layer, value in found.items()}, reports


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_following_fewer_weights_gives_the_same_direction_of_those(name):
    model, batch = build(name)
    whole, _ = projected(model, loss_fn, batch)
    part, _ = projected(model, loss_fn, batch, follow=True)
    assert len(part) == len(whole) - 1
    for layer, value in part.items():
        torch.testing.assert_close(value, whole[layer], rtol=0, atol=1e-12 * float(value.norm() + 1e-30))


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_a_direction_is_the_same_whether_it_is_projected_at_once_or_afterwards(name):
    model, batch = build(name)
    at_once, _ = projected(model, loss_fn, {key: value[:1] for key, value in batch.items()})
    afterwards = directions(model, loss_fn, {key: value[:1] for key, value in batch.items()})
    for layer, value in at_once.items():
        assert (value - afterwards[layer][0]).norm() <= 1e-9 * afterwards[layer][0].norm() + 1e-16, layer


class Watched(nn.Module):
    """A layer that is used once and one that is used twice; notes which weights are away from home between the calls."""

    def __init__(self):
        super().__init__()
        self.below, self.once, self.twice, self.top = (nn.Linear(12, 12) for _ in range(4))
        self.homes = {name: p.data_ptr() for name, p in self.named_parameters()}
        self.away = []

    def forward(self, x):
        hidden = self.twice(torch.tanh(self.twice(torch.tanh(self.once(torch.tanh(self.below(x)))))))
        self.away.append({name for name, p in self.named_parameters() if p.data_ptr() != self.homes[name]})
        return self.top(hidden)


def test_weights_that_are_read_once_are_shifted_while_they_are_read():
    torch.manual_seed(0)
    model, batch = Watched(), (torch.randn(4, 12), torch.arange(4))
    with climbing(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch) as (method, point):
        assert {layer.name for layer in method._moving} == {"below", "once", "twice", "top"}
        model.away.clear()
        method.propose(point)
    assert model.away
    assert all(away == {"twice.weight", "below.bias", "once.bias", "twice.bias", "top.bias"} for away in model.away)


def test_the_shift_that_was_good_enough_is_where_the_next_begins():
    model = Middle(nn.Linear(12, 12), nn.Linear(6, 12), nn.Linear(12, 3)).double()
    shift = ShiftLength()
    first, _ = projected(model, lambda m, x: m(x), batch := torch.randn(5, 6).double(), shift=shift)
    assert 0 < shift.share <= 12 * torch.finfo(torch.float64).eps ** (1 / 3)
    shift.share /= 10  # any length near it gives the same direction
    second, _ = projected(model, lambda m, x: m(x), batch, shift=shift)
    for layer, value in first.items():
        assert (value - second[layer]).norm() <= 1e-6 * value.norm(), layer


# A second backward through the graph that was kept, after moves that change no activation.


@contextmanager
def climbing(model, loss, batch, **settings):
    """A null space method where it begins its steps on a batch, and its point there."""
    with plain_execution(), evaluation_mode(model):
        method = NullSpace(model, loss, TeleportConfig(learning_rate=0.05, max_growth=None, **settings))
        method.survey(method.evaluate(batch, 0))
        method.fit()
        yield method, method.begin(batch, 0)


def assert_backward_alone_equals_evaluate(model, loss, batch, moved=(), steps=2, tolerance=1e-10):
    """Gradients, D and norms after a few moves. Returns the method.

    Args:
        moved: names of layers that must have moved.
    """
    gradients = [p.grad for p in model.parameters()]
    with climbing(model, loss, batch) as (method, point):
        before = {layer.name: layer.matrix({p: p.detach().clone() for p in layer.parameters}) for layer in method.layers}
        # What a checkpoint keeps is out of sight.
        assert (point.graph is not None) == (not isinstance(model, Checkpointed) or model.reentrant)
        started = point.grad_norm
        for _ in range(steps):
            method.propose(point)(1.0)
            point = method.evaluate_again(point)
        fresh = method.evaluate(batch, 0)
        assert abs(started - fresh.grad_norm) > 1e-3 * started  # the moves were none that any gradient would survive
        assert point.loss == pytest.approx(fresh.loss, rel=tolerance)
        assert point.grad_norm == pytest.approx(fresh.grad_norm, rel=tolerance)
        for again, expected in zip(point.gradients, fresh.gradients, strict=True):
            assert (again is None) == (expected is None)
            if again is not None:
                assert (again - expected).norm() <= tolerance * (expected.norm() + 1e-3 * fresh.grad_norm)
        for layer in method._moving:
            pairs = zip(point.trace.uses[layer.weight][layer.region], fresh.trace.uses[layer.weight][layer.region], strict=True)
            for use, expected in pairs:
                if expected.output_gradient is not None:
                    difference = use.output_gradient - expected.output_gradient
                    assert difference.norm() <= tolerance * (expected.output_gradient.norm() + 1e-3 * fresh.grad_norm), layer.name
        after = {layer.name: layer.matrix({p: p.detach() for p in layer.parameters}) for layer in method.layers}
        assert {name for name in before if not torch.equal(before[name], after[name])} >= set(moved)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    return method


@pytest.mark.parametrize("name", MODELS)
def test_backward_alone_equals_evaluate_on_transformers_models(name):
    model, batch = build(name)
    # T5 casts to float32 inside, where the last bit of a rounding may turn over.
    tolerance = 1e-10 if name != "t5" else 1e-8
    assert_backward_alone_equals_evaluate(model, loss_fn, {key: v[:1] for key, v in batch.items()}, tolerance=tolerance)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_backward_alone_equals_evaluate_on_experts(kernel):
    if kernel == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("torch 2.9 and newer have the kernel")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=1, use_cache=False)
    config._experts_implementation = kernel
    ids = torch.randint(0, VOCAB, (1, 6))
    # The grouped kernel has no float64.
    dtype, tolerance = (torch.float64, 1e-10) if kernel == "eager" else (torch.float32, 1e-3)
    experts = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    model, batch = MixtralForCausalLM(config).to(dtype), {"input_ids": ids, "labels": ids}
    assert_backward_alone_equals_evaluate(model, loss_fn, batch, experts, tolerance=tolerance)


class Three(nn.Module):
    """Three linear layers; `middle` says what comes between the first and the last."""

    def __init__(self):
        super().__init__()
        self.below, self.layer, self.above = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def middle(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.above(torch.tanh(self.middle(torch.tanh(self.below(x)))))


class Checkpointed(Three):
    reentrant = False

    def forward(self, x):
        inside = checkpoint(lambda x: torch.tanh(self.layer(torch.tanh(self.below(x)))), x, use_reentrant=self.reentrant)
        return self.above(inside)


class ReentrantCheckpointed(Checkpointed):
    reentrant = True


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class CustomFunction(Three):
    """The weight of one layer is used by a custom function too, which saves it."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(12, 12) / 4)

    def middle(self, x):
        return torch.tanh(Product.apply(torch.tanh(self.layer(x)), self.layer.weight)) + Product.apply(x, self.hidden)


class Masked(Three):
    def middle(self, x):
        mask = torch.ones(12, 12, dtype=x.dtype).tril()
        return F.linear(x, self.layer.weight * mask, self.layer.bias) + x @ self.layer.weight.t().contiguous()


class Cast(Three):
    def middle(self, x):
        return F.linear(x.float(), self.layer.weight.to(torch.float32)).to(x.dtype)


class Normed(Three):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(self.layer)


class Buffered(Three):
    """Counts its forwards, and scales by a buffer that it replaces in each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(12))

    def middle(self, x):
        self.count += 1
        self.scale = 0.9 * torch.ones_like(self.scale)
        return self.layer(x * self.scale)


class FunctionalDropout(Three):
    def middle(self, x):
        return F.dropout(self.layer(F.dropout(x, 0.3, training=True)), 0.3, training=True)


class Repeated(Three):
    def middle(self, x):
        return self.layer(F.relu(self.layer(x), inplace=True))


class FusedAttention(Three):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(12, 2, batch_first=True)

    def middle(self, x):
        return self.layer(x[None], x[None], x[None])[0][0]


class TwoInputs(Three):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(12, 12, 12)

    def middle(self, x):
        return self.layer(x, torch.sigmoid(x))


class Hooked(Three):
    def __init__(self):
        super().__init__()
        self.layer.register_forward_hook(lambda module, inputs, output: 1.5 * output)
        self.layer.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))


class EinsumOfView(Three):
    equation, shape = "nd,dhk->nhk", (12, 3, 4)

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(self.shape) / 3)

    def middle(self, x):
        return torch.einsum(self.equation, self.layer(x), self.heads).flatten(1)


class EinsumOfCopy(EinsumOfView):
    """With its indices in this order autograd saves a copy of the weight."""

    equation, shape = "nd,hdk->nhk", (3, 12, 4)


class Offloaded(Three):
    """What backward needs is copied elsewhere until then, weights too."""

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            return super().forward(x)


class Recurrent(Three):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(12, 12, batch_first=True)

    def middle(self, x):
        return self.layer(x[None])[0][0]


CHAINS = [
    *(Three, Checkpointed, ReentrantCheckpointed, CustomFunction, Masked, Cast, Normed, Buffered, FunctionalDropout, Repeated),
    *(FusedAttention, TwoInputs, Hooked, EinsumOfView, Recurrent),
]


def square(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("kind", CHAINS)
def test_backward_alone_equals_evaluate(kind):
    # A cast to float32 in the middle rounds the two forwards alike, but not what they start from.
    tolerance = 1e-10 if kind is not Cast else 1e-6
    assert_backward_alone_equals_evaluate(kind().double(), square, torch.randn(4, 12).double(), {"above"}, tolerance=tolerance)


def test_backward_alone_equals_evaluate_on_what_is_compiled():
    model = Three().double()
    model.layer.compile()
    model = torch.compile(model)
    assert_backward_alone_equals_evaluate(model, square, torch.randn(4, 12).double(), steps=1)


def test_backward_alone_equals_evaluate_on_convolutions():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.layer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
            self.norm, self.above, self.up = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3), nn.ConvTranspose2d(2, 2, 2)

        def forward(self, x):
            return self.up(torch.tanh(self.above(torch.relu(self.norm(self.layer(torch.tanh(self.below(x))))))))

    model, batch = Images().double(), torch.randn(1, 3, 4, 4).double()
    model.norm.running_var.fill_(0.3)
    running = model.norm.running_mean.clone()
    assert_backward_alone_equals_evaluate(model, square, batch, {"layer", "above"})
    assert torch.equal(model.norm.running_mean, running)
    assert_backward_alone_equals_evaluate(model.to(memory_format=torch.channels_last), square, batch, {"layer", "above"})


@pytest.mark.parametrize("kind", [EinsumOfCopy, Offloaded])
def test_where_backward_reads_copies_of_weights_the_graph_is_not_kept(kind):
    """Else D would be that of the weights at the first step."""
    model, batch = kind().double(), torch.randn(4, 12).double()
    with climbing(model, square, batch) as (method, point):
        assert point.graph is None
        assert not method.trusting
        for _ in range(2):
            method.propose(point)(1.0)
            point = method.evaluate_again(point)
        fresh = method.evaluate(batch, 0)
        for again, expected in zip(point.gradients, fresh.gradients, strict=True):
            assert (again - expected).norm() <= 1e-10 * fresh.grad_norm


def test_without_its_graph_there_is_no_second_backward():
    model = Three()
    with pytest.raises(ValueError, match="keep_graph=True"):
        evaluate_again(evaluate(model, square, torch.randn(4, 12), seed=0))


@pytest.mark.parametrize("function", [torch.relu, torch.exp, torch.tanh, torch.sigmoid, lambda x: torch.softmax(x, -1)])
def test_what_is_kept_goes_with_the_point(function):
    """Functions whose backward reads their own output: a node that holds it by a plain reference is never freed."""
    seen = []

    class Watched(Three):
        def middle(self, x):
            output = function(self.layer(x))
            seen.append(weakref.ref(output.untyped_storage()))
            return output

    model, batch = Watched(), torch.randn(4, 12)
    gc.collect()
    gc.disable()
    try:
        point = evaluate(model, square, batch, seed=0, keep_graph=True)
        assert seen[0]() is not None
        again = evaluate_again(point)
        del point, again
        assert all(reference() is None for reference in seen)
        point = evaluate(model, square, batch, seed=0)
        del point
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_gradients_of_parameters_are_left_as_they_are():
    model, batch = Three(), torch.randn(4, 12)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    evaluate_again(evaluate(model, square, batch, seed=0, keep_graph=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
