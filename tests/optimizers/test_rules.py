"""What becomes of each tensor in a state, found from the optimizer itself."""

import pytest
import torch
from torch import nn, optim

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.optimizers.rules import judge
from hf_teleport.optimizers.state import OptimizerState, check_optimizer


class Keeps(optim.Optimizer):
    """Keeps what a function makes of the weight, its gradient and what it kept before."""

    def __init__(self, params, kept, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.kept = kept

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["kept"] = self.kept(p, p.grad, state.get("kept"))
                p.sub_(group["lr"] * p.grad.sign())


class LowRank(optim.Optimizer):
    """A group with "rank" keeps projected averages."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, basis = self.state[p], torch.eye(len(p))
                if "rank" in group:
                    basis = state.setdefault("basis", [torch.linalg.svd(p.grad)[0][:, : group["rank"]]])[0]
                g = basis.T @ p.grad
                for name, value in (("exp_avg", g), ("exp_avg_sq", g * g)):
                    state.setdefault(name, torch.zeros_like(g)).lerp_(value, 0.1)
                p.sub_(basis @ (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)), alpha=group["lr"])


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


def found(optimizer):
    (judgement,) = judge(optimizer).values()
    return judgement


def average(p, g, before):
    return 0.1 * g if before is None else 0.9 * before + 0.1 * g


@pytest.mark.parametrize(
    ("kept", "axes", "square", "degree"),
    [
        (average, {0: (0,), 1: (1,)}, False, 1),
        (lambda p, g, before: g.sign(), {0: (0,), 1: (1,)}, False, 0),
        (lambda p, g, before: g * g, {0: (0,), 1: (1,)}, True, 2),
        (lambda p, g, before: g.abs(), {0: (0,), 1: (1,)}, True, 1),
        (lambda p, g, before: (g * g).mean(1), {0: (0,), 1: ()}, True, 2),
        (lambda p, g, before: (g * g).mean(0, keepdim=True), {0: (), 1: (1,)}, True, 2),
        (lambda p, g, before: g @ g.T, {0: (0, 1), 1: ()}, False, 2),
        (lambda p, g, before: torch.linalg.eigh(g.T @ g)[1], {0: (), 1: (0,)}, False, 0),
        (lambda p, g, before: torch.linalg.svdvals(g), {0: (), 1: ()}, False, 1),
        (lambda p, g, before: {"a": [average(p, g, None)]}, {0: (0,), 1: (1,)}, False, 1),
    ],
)
def test_a_tensor_shows_what_it_is(kept, axes, square, degree):
    judgement = found(Keeps([weight(9, 7)], kept))
    assert not judgement.problem
    (rule,) = judgement.rules.values()
    assert (rule.axes, rule.square, rule.degree) == (axes, square, degree)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (lambda p, g, before: p.clone(), "goes with the values of the weights"),
        (lambda p, g, before: p.clone() if before is None else before, "goes with the values of the weights"),
        (lambda p, g, before: g > 0, "can't be read as numbers"),
        (lambda p, g, before: g * g.roll(1, 0), "no rule"),
        (lambda p, g, before: torch.linalg.cholesky(g @ g.T + torch.eye(len(g))), "no rule"),
        (lambda p, g, before: torch.ones_like(g), "no rule"),
        (lambda p, g, before: torch.eye(len(g)), "no rule"),
        (lambda p, g, before: torch.zeros_like(g), "no rule"),
        (lambda p, g, before: torch.rand_like(g), "no rule"),
        (lambda p, g, before: iter([g]), "can't be looked into"),
        (lambda p, g, before: g.flatten(), "no rule"),
        (lambda p, g, before: 1 / 0, "could not be tried"),
    ],
)
def test_what_shows_nothing_known_has_no_rule(kept, why):
    assert why in found(Keeps([weight(9, 7)], kept)).problem


def test_a_state_that_depends_on_the_size_is_judged_by_the_real_one():
    def factored(p, g, before):
        return [(g * g).mean(1), (g * g).mean(0)] if min(g.shape) >= 128 else g * g

    small, large = (found(Keeps([weight(*shape)], factored)) for shape in ((9, 7), (130, 140)))
    assert small.rules.keys() == {"kept"}
    assert large.rules.keys() == {"kept.0", "kept.1"}
    assert not small.problem + large.problem


def test_a_state_that_depends_on_the_options_of_a_group_or_the_shape_is_judged_for_each():
    optimizer = LowRank([{"params": [weight(8, 6), weight(4, 8)]}, {"params": [weight(8, 8)], "rank": 2}])
    plain, wide, low = judge(optimizer).values()
    assert plain.rules.keys() == wide.rules.keys() == {"exp_avg", "exp_avg_sq"}
    assert low.rules["basis.0"].axes == {0: (0,), 1: ()}
    assert low.rules["exp_avg"].axes == {0: (), 1: (1,)}
    assert low.rules["exp_avg_sq"].square


def test_projected_averages_stay_and_their_projector_turns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    first, middle, last = net.parameters()
    optimizer = LowRank([{"params": [first, last]}, {"params": [middle], "rank": 2}])
    batch = torch.randn(32, 6), torch.randn(32, 4)

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def cosine():
        optimizer.zero_grad()
        loss(net, batch).backward()
        state = optimizer.state[middle]
        return nn.functional.cosine_similarity((state["basis"][0] @ state["exp_avg"]).flatten(), middle.grad.flatten(), 0)

    for _ in range(3):
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
    before = cosine()
    kept = middle.detach().clone()
    Teleporter(net, TeleportConfig(method="basis"), optimizer=optimizer).teleport([batch], loss)
    assert not torch.allclose(middle, kept)
    torch.testing.assert_close(cosine(), before, rtol=1e-3, atol=1e-3)


def test_a_state_other_than_was_judged_leaves_its_symmetries_out():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
    optimizer = optim.AdamW(net.parameters())
    batch = torch.randn(32, 6), torch.randn(32, 4)

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    loss(net, batch).backward()
    optimizer.step()
    check_optimizer(optimizer)
    optimizer.state[net[2].weight]["later"] = torch.randn(8, 8)
    assert "later" in OptimizerState(optimizer).objection(net[2].weight)
    before = [net[i].weight.detach().clone() for i in (2, 3, 4)]
    report = Teleporter(net, TeleportConfig(method="basis"), optimizer=optimizer).teleport([batch], loss)
    assert any("later" in symmetry.reason for symmetry in report.symmetries)
    assert torch.equal(net[2].weight, before[0])


def test_whether_steps_see_the_basis_is_judged_where_something_turns():
    assert found(optim.AdamW([weight(9, 7)])).sees
    assert not found(optim.SGD([weight(9, 7)], lr=0.1, momentum=0.9)).sees
    assert not found(optim.Muon([weight(9, 7)])).sees


def test_judging_leaves_no_trace():
    optimizer = optim.Adagrad([weight(9, 7)])
    sums, state = optimizer.state[optimizer.param_groups[0]["params"][0]]["sum"].clone(), torch.get_rng_state()
    judge(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    (kept,) = optimizer.state.values()
    assert torch.equal(kept["sum"], sums)
    assert kept["step"] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.AdamW(p, foreach=True),
        lambda p: optim.AdamW(p, fused=True),
        lambda p: optim.AdamW(p, maximize=True, amsgrad=True),
        lambda p: optim.AdamW(p, lr=torch.tensor(1e-3)),
        lambda p: optim.AdamW([{"params": p[:1], "betas": (0.5, 0.9)}, {"params": p[1:], "lr": 0.0}]),
        lambda p: optim.AdamW([*p, nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))]),
        lambda p: optim.AdamW([*p, nn.Parameter(torch.zeros(3), requires_grad=False)]),
        lambda p: optim.Adam([q.data.bfloat16().requires_grad_() for q in p], differentiable=False),
        lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
        lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
        lambda p: optim.AdamW([*p, nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(1, 8))]),
    ],
)
def test_options_in_use_are_accepted(make):
    check_optimizer(make([weight(9, 7), weight(9)]))


@pytest.mark.parametrize("make", [optim.LBFGS, optim.SparseAdam])
def test_what_does_not_step_by_a_dense_gradient_is_refused(make):
    for reset in (False, True):
        with pytest.raises(ValueError, match=r"closure|dense gradients"):
            check_optimizer(make([weight(9, 7)]), reset=reset)
