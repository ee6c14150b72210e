"""A rehearsed step against the real optimizer's, and the optimizer as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor

from hf_teleport.optimizers.rehearsal import Rehearsal

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2, weight_decay=0.0),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


def trained(name, steps=3, dtype=torch.float64):
    """A small network, an optimizer that has taken a few steps on it, and the gradients for the next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for _ in range(steps):
        _gradients(model)
        optimizer.step()
    model.zero_grad()
    return model, optimizer, _gradients(model, keep=False)


def _gradients(model, keep=True):
    dtype = next(model.parameters()).dtype
    loss = model(torch.randn(6, 5, dtype=dtype)).square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    if keep:
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
    return list(found)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_real_optimizers_step(name, steps):
    model, optimizer, gradients = trained(name, steps)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    found = Rehearsal(optimizer).step(parameters, gradients)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(parameters, before, strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    trained_by = {p for group in optimizer.param_groups for p in group["params"]}
    for parameter, old, step in zip(parameters, before, found, strict=True):
        assert (step is None) == (parameter not in trained_by)
        if step is not None:
            torch.testing.assert_close(step, parameter.detach() - old, rtol=1e-9, atol=1e-12)


def test_has_the_rate_of_a_schedule_and_runs_none_of_its_hooks():
    model, optimizer, gradients = trained("adam")
    schedule = LambdaLR(optimizer, lambda step: 0.25)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append(args))
    counted = optimizer.step
    quarter = Rehearsal(optimizer).step(list(model.parameters()), gradients)
    optimizer.param_groups[0]["lr"] = 1e-2
    whole = Rehearsal(optimizer).step(list(model.parameters()), gradients)
    torch.testing.assert_close([4 * step for step in quarter], whole)
    assert not calls
    assert optimizer.step == counted
    assert schedule.last_epoch == 0


def test_leaves_weight_decay_out():
    model, _, gradients = trained("sgd")
    parameters = list(model.parameters())
    plain, decaying = (torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay) for decay in (0.0, 0.5))
    torch.testing.assert_close(
        Rehearsal(decaying).step(parameters, gradients), Rehearsal(plain).step(parameters, gradients), rtol=1e-9, atol=1e-12
    )


def test_a_small_step_is_not_drowned_by_large_weights():
    torch.manual_seed(0)
    parameter = nn.Parameter(1e3 * torch.ones(50))
    gradient = 0.1 * torch.randn(50)
    (step,) = Rehearsal(torch.optim.SGD([parameter], lr=1e-6)).step([parameter], [gradient])
    torch.testing.assert_close(step, -1e-6 * gradient, rtol=2e-2, atol=1e-10)


def test_clips_as_training_does():
    model, optimizer, gradients = trained("nesterov")
    parameters = list(model.parameters())
    found = Rehearsal(optimizer, max_grad_norm=0.01).step(parameters, gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    assert torch.nn.utils.clip_grad_norm_(parameters, 0.01) > 0.01
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    torch.testing.assert_close(found, [p.detach() - b for p, b in zip(parameters, before, strict=True)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adagrad", "rmsprop"])
def test_pulls_back_what_its_step_pushes_forward(name, max_grad_norm):
    model, optimizer, gradients = trained(name)
    parameters = list(model.parameters())
    rehearsal = Rehearsal(optimizer, max_grad_norm=max_grad_norm)
    generator = torch.Generator().manual_seed(1)
    cotangents, tangents = ([torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients] for _ in range(2))
    pulled = rehearsal.pull_back(parameters, gradients, cotangents)
    h = 1e-6
    ahead, behind = (
        rehearsal.step(parameters, [g + sign * h * t for g, t in zip(gradients, tangents, strict=True)]) for sign in (1, -1)
    )
    pushed = sum(float(((a - b) / (2 * h) * c).sum()) for a, b, c in zip(ahead, behind, cotangents, strict=True))
    assert sum(float((p * t).sum()) for p, t in zip(pulled, tangents, strict=True)) == pytest.approx(pushed, rel=1e-5)


def test_missing_gradients_and_cotangents():
    model, optimizer, gradients = trained("adam")
    parameters = list(model.parameters())
    rehearsal = Rehearsal(optimizer, max_grad_norm=0.05)
    gradients[1] = None
    assert [step is None for step in rehearsal.step(parameters, gradients)] == [False, True, False, False]
    assert rehearsal.pull_back(parameters, gradients, [None] * 4) == [None] * 4
    pulled = rehearsal.pull_back(parameters, gradients, [None, *(torch.ones_like(p) for p in parameters[1:])])
    assert pulled[1] is None
    assert all(p is not None and p.isfinite().all() for i, p in enumerate(pulled) if i != 1)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_steps_are_those_that_follow(name, max_grad_norm):
    model, optimizer, _ = trained(name)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    batches = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    rates = [[0.01], [0.02], [0.005]]

    def gradients(i):
        return list(torch.autograd.grad(model(batches[i]).square().mean(), parameters))

    with Rehearsal(optimizer, max_grad_norm=max_grad_norm, rates=lambda i: rates[i]).ahead(parameters, gradients, 3):
        reached = [p.detach().clone() for p in parameters]
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(parameters, before, strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    for i in range(3):
        for parameter, gradient in zip(parameters, gradients(i), strict=True):
            parameter.grad = gradient
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.param_groups[0]["lr"] = rates[i][0]
        optimizer.step()
    torch.testing.assert_close(reached, [p.detach() for p in parameters], rtol=1e-12, atol=1e-12)


def test_what_is_forgotten_starts_anew():
    model, optimizer, gradients = trained("adam")
    parameters = list(model.parameters())
    fresh = torch.optim.Adam(parameters, lr=1e-2)
    ends = []
    for own, forgotten in ((optimizer, parameters), (fresh, [])):
        with Rehearsal(own).ahead(parameters, lambda i: gradients, 2, forgotten):
            ends.append([p.detach().clone() for p in parameters])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_an_error_on_the_way_puts_everything_back():
    model, optimizer, _ = trained("adam")
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]

    def gradients(i):
        if i:
            raise RuntimeError("on the way")
        return [torch.ones_like(p) for p in parameters]

    with pytest.raises(RuntimeError, match="on the way"), Rehearsal(optimizer).ahead(parameters, gradients, 2):
        pass
    assert all(torch.equal(p, b) and p.grad.eq(1).all() for p, b in zip(parameters, before, strict=True))
