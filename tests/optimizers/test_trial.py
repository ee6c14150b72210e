"""What a trial on other weights must know of the real ones: their marks, what they share, and where their averages are."""

import pytest
import torch
from torch import nn, optim

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.optimizers.state import OptimizerState, check_optimizer


class Averages(optim.Optimizer):
    """Adam's averages. `squares(self, p)` gives the dict that has those of a weight's squares."""

    def __init__(self, params, squares=lambda self, p: self.state[p], lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.squares, self.shared = squares, {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, basis = self.state[p], self.basis(p)
                gradient = basis @ p.grad
                state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(gradient, 0.1)
                state["exp_avg_sq"] = self.squares(self, p).setdefault("exp_avg_sq", torch.zeros_like(p))
                state["exp_avg_sq"].lerp_(gradient * gradient, 0.1)
                p.sub_(basis.T @ (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)), alpha=group["lr"])

    def basis(self, p):
        return torch.eye(len(p))


class InItsOwnBasis(Averages):
    """Averages of a weight with a mark are in a basis that does not turn along."""

    def basis(self, p):
        marked = "own" in str(getattr(p, "settings", ""))
        n = len(p)
        return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0))).Q if marked else torch.eye(n)


class Flat(optim.Optimizer):
    """The states are views of one long tensor, by which it steps."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.own = [p for group in self.param_groups for p in group["params"]]
        self.average, start = torch.zeros(sum(p.numel() for p in self.own)), 0
        for p in self.own:
            self.state[p] = {"exp_avg": self.average[start : start + p.numel()].view_as(p)}
            start += p.numel()

    @torch.no_grad()
    def step(self, closure=None):
        self.average.lerp_(torch.cat([p.grad.flatten() for p in self.own]), 0.1)
        for p, step in zip(self.own, self.average.sign().split([p.numel() for p in self.own]), strict=True):
            p.sub_(self.param_groups[0]["lr"] * step.view_as(p))


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))


BATCH = torch.randn(32, 6), torch.randn(32, 6)


def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def stepped(model, optimizer):
    optimizer.zero_grad()
    loss(model, BATCH).backward()
    optimizer.step()


@pytest.mark.parametrize("mark", ["own", {"basis": "own"}, ["own"]])
def test_marks_of_weights_are_those_of_a_trial(mark):
    model = net()
    check_optimizer(InItsOwnBasis(model.parameters()))
    model[1].weight.settings = mark
    with pytest.raises(ValueError, match="can't follow a change of basis"):
        check_optimizer(InItsOwnBasis(model.parameters()))


@pytest.mark.parametrize("reset", [False, True])
def test_averages_that_weights_of_a_shape_share_are_refused_before_training(reset):
    shares = Averages(net().parameters(), lambda self, p: self.shared.setdefault(p.shape, {}))
    with pytest.raises(ValueError, match="beside what it keeps in its state"):
        check_optimizer(shares, reset=reset)
    check_optimizer(Averages(net().parameters()), reset=reset)


def test_averages_that_weights_share_later_leave_their_symmetries_out():
    model = net()
    optimizer = Averages(model.parameters())
    check_optimizer(optimizer)
    stepped(model, optimizer)
    first, second = (optimizer.state[model[i].weight] for i in (0, 1))
    second["exp_avg_sq"] = first["exp_avg_sq"]
    assert "one tensor for several weights" in OptimizerState(optimizer).objection(model[0].weight)
    assert not OptimizerState(optimizer).objection(model[2].weight)
    kept = [layer.weight.detach().clone() for layer in model]
    report = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer).teleport([BATCH], loss)
    assert report.stopped_because == "nothing_movable"
    assert any("one tensor for several weights" in symmetry.reason for symmetry in report.symmetries)
    assert all(torch.equal(layer.weight, before) for layer, before in zip(model, kept, strict=True))


def test_views_of_one_tensor_turn_but_cannot_be_reset():
    model = net()
    optimizer = Flat(model.parameters())
    check_optimizer(optimizer)
    with pytest.raises(ValueError, match="where no reset of some weights reaches"):
        check_optimizer(optimizer, reset=True)
    stepped(model, optimizer)

    def along():
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        pairs = [(optimizer.state[p]["exp_avg"].flatten(), p.grad.flatten()) for p in model.parameters()]
        return torch.stack([nn.functional.cosine_similarity(*pair, 0) for pair in pairs])

    before, kept = along(), optimizer.average.clone()
    report = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer).teleport([BATCH], loss)
    assert report.steps
    torch.testing.assert_close(along(), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(optimizer.average, kept)
