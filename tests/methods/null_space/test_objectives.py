"""The gradient of every objective against double backward and against differences of its value, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.shift import shifted
from hf_teleport.methods import NullSpace
from hf_teleport.methods.null_space.objectives import OBJECTIVES
from hf_teleport.optimizers.rehearsal import Rehearsal
from hf_teleport.weights.isolation import evaluation_mode, plain_execution

from tiny_models import build, loss_fn


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 18), nn.Tanh(), nn.Linear(18, 4)).double()
    batches = [(torch.randn(5, 12, dtype=torch.float64), torch.arange(5) % 4) for _ in range(2)]
    return model, batches


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def warm(model, optimizer, loss, batches):
    """Let an optimizer take some steps."""
    for batch in [*batches, *batches]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-2),
}


def climber(model, batches, loss, objective, optimizer=None, max_grad_norm=None, **settings):
    """The method at the beginning of its first turn, and its point there."""
    method = NullSpace(model, loss, TeleportConfig(objective=objective, **settings))
    if optimizer is not None:
        method.rehearsal = Rehearsal(optimizer, max_grad_norm=max_grad_norm)
    for i, batch in enumerate(batches):
        method.survey(method.evaluate(batch, i))
    method.fit()
    return method, method.begin(batches[0], 0)


def hessian_product(model, loss, batch, along):
    """`H v` by double backward."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model, batch), parameters, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(gradients, along, strict=True) if v is not None)
    return torch.autograd.grad(inner, parameters, allow_unused=True)


def whole_gradient(model, loss, batch, slope):
    """`H v + p`."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    if slope.along is not None:
        total = [t if h is None else t + h for t, h in zip(total, hessian_product(model, loss, batch, slope.along), strict=True)]
    if slope.plain is not None:
        total = [t if p is None else t + p for t, p in zip(total, slope.plain, strict=True)]
    return total


@pytest.mark.parametrize(
    ("objective", "optimizer", "max_grad_norm"),
    [
        ("grad_norm", None, None),
        ("lookahead", "sgd", None),
        ("lookahead", "sgd", 0.1),
        ("lookahead", "momentum", None),
        ("lookahead", "adam", 0.1),
        ("lookahead", "adagrad", None),
        ("sharpness", None, None),
        ("curvature", None, None),
    ],
)
def test_gradient_is_that_of_the_value(objective, optimizer, max_grad_norm):
    model, batches = network()
    if optimizer is not None:
        optimizer = OPTIMIZERS[optimizer](model.parameters())
        warm(model, optimizer, entropy, batches)
    method, point = climber(model, batches, entropy, objective, optimizer, max_grad_norm)
    # The radius of sharpness and curvature goes with the norm of the weights, which the derivative takes as given.
    own = method._objective
    gradient = whole_gradient(model, entropy, batches[0], own.slope(point))
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    if objective in ("sharpness", "curvature"):
        # Tangent to the sphere of their norm.
        inside = sum(float((d * p.detach()).sum()) for d, p in zip(direction, parameters, strict=True))
        size = sum(float(p.detach().square().sum()) for p in parameters)
        direction = [d - inside / size * p.detach() for d, p in zip(direction, parameters, strict=True)]
    values = []
    h = 1e-4
    for sign in (1, -1):
        with shifted(parameters, direction, sign * h):
            values.append(own.slope(method.evaluate(batches[0], 0)).value)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=2e-5, abs=1e-9)
    assert abs(slope) > 1e-6


def double_backward_of_lookahead(model, batches, kind, rate, state):
    """The gradient of `-L_B(W + s(g_A(W)))` with the optimizer's formula written out, and everything differentiated twice."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = lambda values, batch: F.cross_entropy(functional_call(model, values, batch[0]), batch[1])  # noqa: E731
    gradients = torch.autograd.grad(loss(weights, batches[0]), list(weights.values()), create_graph=True)
    landed = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if kind == "sgd":
            landed[name] = weight - rate * gradient
            continue
        old = state[name]
        step = float(old["step"]) + 1
        first = 0.9 * old["exp_avg"] + 0.1 * gradient
        second = 0.999 * old["exp_avg_sq"] + 0.001 * gradient.square()
        denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
        landed[name] = weight - rate * first / (1 - 0.9**step) / denominator
    return torch.autograd.grad(-loss(landed, batches[1]), list(weights.values()))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_lookahead_is_double_backward(kind):
    model, batches = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    warm(model, optimizer, entropy, batches)
    method, point = climber(model, batches, entropy, "lookahead", optimizer)
    slope = method._objective.slope(point)
    state = {name: optimizer.state.get(p) for name, p in model.named_parameters()}
    rate = optimizer.param_groups[0]["lr"]
    expected = dict(zip(model.parameters(), double_backward_of_lookahead(model, batches, kind, rate, state), strict=True))
    moves = method._projected(point, slope)
    for layer, move in moves.items():
        wanted = method.subspaces[layer].project(layer.matrix(expected))
        if layer.name == "0":  # the first layer has no direction
            assert wanted.norm() < 1e-12
            assert move.norm() < 1e-12
        else:
            assert wanted.norm() > 1e-6
            assert (move - wanted).norm() <= 1e-5 * wanted.norm()
    assert len(moves) == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "resnet"])
def test_projected_direction_is_exact_on_transformers_models(name, objective):
    model, batch = build(name)
    model = model.double()
    halves = [
        {key: value[rows].double() if value.is_floating_point() else value[rows] for key, value in batch.items()}
        for rows in (slice(0, 1), slice(1, 2))
    ]
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with plain_execution(), evaluation_mode(model):
        method, point = climber(model, halves, loss_fn, objective, optimizer, max_grad_norm=1.0)
        slope = method._objective.slope(point)
        fast = method._projected(point, slope)
        exact, again = climber(model, halves, loss_fn, objective, optimizer, max_grad_norm=1.0, hessian="exact")
        by_name = {layer.name: move for layer, move in exact._projected(again, slope).items()}
    compared = 0
    for layer, move in fast.items():
        wanted = by_name[layer.name]
        scale = max(value.norm() for value in by_name.values())
        assert (move - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9 * scale, layer.name
        compared += bool(wanted.norm() > 1e-6 * scale)
    assert compared >= 2


@pytest.mark.parametrize("objective", ["predicted_decrease", "lookahead", "sharpness", "curvature"])
def test_an_event_raises_it(objective):
    model, batches = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    method, point = climber(model, batches, entropy, objective, optimizer)
    before = method._objective.slope(point).value
    config = TeleportConfig(method="null_space", objective=objective, max_growth=None)
    report = Teleporter(model, config, optimizer=optimizer).teleport(batches, entropy)
    assert report.steps
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-10)
    method, point = climber(model, batches, entropy, objective, optimizer)
    assert method._objective.slope(point).value > before


def test_a_turn_ends_when_no_step_gains(monkeypatch):
    model, batches = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    # Up is down: what is called the gradient leads to lower values only.
    slope_of = OBJECTIVES["lookahead"].slope

    def turned(self, point):
        slope = slope_of(self, point)
        slope.along, slope.plain = ([None if t is None else -t for t in part] for part in (slope.along, slope.plain))
        return slope

    monkeypatch.setattr(OBJECTIVES["lookahead"], "slope", turned)
    config = TeleportConfig(method="null_space", objective="lookahead", learning_rate=1e-3)
    report = Teleporter(model, config, optimizer=optimizer).teleport(batches, entropy)
    assert (report.steps, report.stopped_because) == (0, "no_gain")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("objective", ["predicted_decrease", "lookahead"])
def test_needs_the_optimizer(objective):
    model, batches = network()
    with pytest.raises(ValueError, match=r"optimizer=.*grad_norm"):
        Teleporter(model, TeleportConfig(objective=objective)).teleport(batches, entropy)


def test_predicted_decrease_of_sign_descent():
    """AdamW on its first step goes by signs: what is climbed is the sum of absolute values."""
    model, batches = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method, point = climber(model, batches, entropy, "predicted_decrease", optimizer)
    slope = method._objective.slope(point)
    expected = 1e-2 * sum(g.abs().sum() for g in point.gradients)
    assert slope.value == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("rate", [0.3, 30.0])
def test_an_event_is_kept_only_if_the_next_steps_end_lower(rate):
    """The gradient norm doubled: better for a small learning rate, and worse for one that overshoots already."""
    ends = {}
    for rehearsal_steps in (0, 3):
        model, batches = network()
        held_back = (torch.randn(5, 12, dtype=torch.float64), torch.arange(5) % 4)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        config = TeleportConfig(method="null_space", rehearsal_steps=rehearsal_steps, max_growth=3, max_loss_change=None)
        report = Teleporter(model, config, optimizer=optimizer).teleport(batches, entropy, held_back)
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == (not report.rolled_back)
        ends[rehearsal_steps] = report.stopped_because, landed(model, before, optimizer, batches, held_back), moved
    reason, (without, with_it), _ = ends[0]
    assert ends[3][0] == (reason if with_it < without else "no_better")
    assert ends[3][2] == (with_it < without)
    assert (with_it < without) == (rate < 1)


def landed(model, before, optimizer, batches, held_back):
    """The loss held back after three real steps: from the weights before, and from those now."""
    own = [p.detach().clone() for p in model.parameters()]
    ends = []
    for start in (before, own):
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.data = value.clone()
        for i in range(3):
            optimizer.zero_grad()
            entropy(model, batches[i % 2]).backward()
            optimizer.step()
        ends.append(entropy(model, held_back).item())
    return ends
