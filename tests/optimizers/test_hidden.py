"""Optimizers that keep what matters elsewhere than in their state: found and turned, or refused before training."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.weak import WeakTensorKeyDictionary

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.optimizers.hidden import hidden
from hf_teleport.optimizers.parts import parts
from hf_teleport.optimizers.reach import reach
from hf_teleport.optimizers.rehearsal import Rehearsal, RehearsalError
from hf_teleport.optimizers.state import check_optimizer

ANYWHERE = defaultdict(dict)
BY_WEAK_REFERENCE = WeakTensorKeyDictionary()


class Momentum(optim.Optimizer):
    """Signs of an average, and the average is kept where `place(self, p)` says: it gives a dict."""

    def __init__(self, params, place, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.place, self.kept = place, {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.place(self, p).setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 0.1)
                    p.sub_(group["lr"] * average.sign())


class AsNumbers(optim.Optimizer):
    """Keeps its average as a list of Python's numbers."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.kept = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = torch.tensor(self.kept.get(p, torch.zeros_like(p).tolist())).lerp(p.grad, 0.1)
                self.kept[p] = average.tolist()
                p.sub_(group["lr"] * average.sign())


class Lists(optim.Optimizer):
    """The averages of a whole group are a list, in the group or in the state of its first parameter."""

    def __init__(self, params, in_group, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.in_group = in_group

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            holder = group if self.in_group else self.state[group["params"][0]]
            averages = holder.setdefault("averages", [torch.zeros_like(p) for p in group["params"]])
            for p, average in zip(group["params"], averages, strict=True):
                average.lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * average.sign())


class LookaheadWithin(optim.AdamW):
    """Draws the weights back to slow copies, every so many steps: more than a trial makes."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr)
        self.slow, self.count = {}, 0

    def step(self, closure=None):
        super().step()
        self.count += 1
        for p in [p for group in self.param_groups for p in group["params"]]:
            slow = self.slow.setdefault(p, p.detach().clone())
            if self.count % 100 == 0:
                p.data.copy_(slow.lerp_(p.data, 0.5))


class Marked(nn.Parameter):
    """A parameter that carries the average itself."""


HIDES = {
    "an attribute": lambda p: Momentum(p, lambda self, p: self.kept.setdefault(p, {})),
    "a global variable": lambda p: Momentum(p, lambda self, p: ANYWHERE[p]),
    "weak references": lambda p: Momentum(p, lambda self, p: BY_WEAK_REFERENCE.setdefault(p, {})),
    "the parameter": lambda p: Momentum([Marked(q.detach()) for q in p], lambda self, p: vars(p).setdefault("own", {})),
    "a closure": lambda p: Momentum(p, (lambda kept: lambda self, p: kept.setdefault(p, {}))({})),
    "numbers": AsNumbers,
    "a list in a group": lambda p: Lists(p, True),
    "a list in one state": lambda p: Lists(p, False),
    "slow copies": LookaheadWithin,
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))


BATCH = torch.randn(32, 6), torch.randn(32, 4)


def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        optimizer.step()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("make", HIDES.values(), ids=HIDES)
def test_what_is_kept_elsewhere_is_refused_before_training(make, reset):
    with pytest.raises(ValueError, match=r"elsewhere than in its state|beside what it keeps in its state"):
        check_optimizer(make(list(net().parameters())), reset=reset)


class Chosen(optim.AdamW):
    """Knows some weights by what they are."""

    def __init__(self, params, choose):
        super().__init__(params)
        self.chosen = choose([p for group in self.param_groups for p in group["params"]])


@pytest.mark.parametrize(
    "choose",
    [
        lambda p: {id(p[-1])},
        lambda p: {p[-1]: "muon"},
        lambda p: [p[-1]],
        lambda p: {"muon": tuple(p[1:])},
        lambda p: SimpleNamespace(names={id(q): str(i) for i, q in enumerate(p)}),
    ],
)
def test_weights_that_are_known_by_what_they_are_are_refused_before_training(choose):
    own = list(net().parameters())
    with pytest.raises(ValueError, match="tells weights apart by what it keeps in chosen"):
        check_optimizer(Chosen(own, choose))
    check_optimizer(Chosen(own, lambda p: {"all": p, "sizes": {1: 2}}))


def test_what_is_kept_in_the_state_is_not():
    check_optimizer(Momentum(net().parameters(), lambda self, p: self.state[p]))


@pytest.mark.parametrize("where", ["an attribute", "a closure", "slow copies"])
def test_what_is_kept_elsewhere_is_not_rehearsed(where):
    with pytest.raises(RehearsalError, match="elsewhere than in its state"):
        Rehearsal(HIDES[where](list(net().parameters())))


class Holder(optim.Optimizer):
    """Steps by others, which it holds in some way."""

    def __init__(self, params, hold, get):
        self.held, self.get = hold(optim.AdamW(params, lr=1e-2)), get
        super().__init__(params, {})

    def step(self, closure=None):
        self.get(self.held).step()


def deep(optimizer, levels=12):
    for _ in range(levels):
        optimizer = [{"in": SimpleNamespace(own=optimizer)}]
    return optimizer


def deepest(held, levels=12):
    for _ in range(levels):
        held = held[0]["in"].own
    return held


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


HOLDS = {
    "deep": (deep, deepest),
    "a partial function": (lambda o: partial(lambda a: a, o), lambda held: held()),
    "slots": (Slots, lambda held: held.inner),
    "a default value": (lambda o: lambda a=o: a, lambda held: held()),
    "a module": (lambda o: setattr(module := nn.Module(), "own", o) or module, lambda held: held.own),
}


@pytest.mark.parametrize(("hold", "get"), HOLDS.values(), ids=HOLDS)
def test_an_optimizer_in_another_is_found_at_any_depth_and_turned(hold, get):
    model = net()
    optimizer = Holder(list(model.parameters()), hold, get)
    train(model, optimizer)
    (inner,) = parts(optimizer)

    def cosine():
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        middle = model[1].weight
        return nn.functional.cosine_similarity(inner.state[middle]["exp_avg"].flatten(), middle.grad.flatten(), 0)

    before = cosine()
    report = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer).teleport([BATCH], loss)
    assert report.steps == 1
    torch.testing.assert_close(cosine(), before, rtol=1e-3, atol=1e-3)


def test_optimizers_in_hooks_of_gradients_are_found():
    model = net()
    for parameter in model.parameters():
        own = optim.AdamW([parameter], lr=1e-2)
        parameter.register_post_accumulate_grad_hook(lambda p, own=own: own.step())
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    assert [type(part) for part in parts(optimizer)] == [optim.AdamW] * 3
    check_optimizer(optimizer)


def hooked(optimizer):
    optimizer.register_step_pre_hook(lambda *_: None)


def replaced(optimizer):
    optimizer.step = lambda closure=None: None


def masked(optimizer):
    mask = torch.ones(8, 8)
    optimizer.param_groups[0]["params"][1].register_hook(lambda gradient: gradient * mask)


def marked(optimizer):
    optimizer.param_groups[0]["params"][1].main_copy = torch.ones(8, 8)


def averaged(optimizer):
    optimizer.average = optim.swa_utils.AveragedModel(net())


def foreign(optimizer):
    optimizer.state["flat"] = torch.ones(8)


PUT_ON = {
    hooked: "has a step hook",
    replaced: "was replaced by another function",
    masked: r"keeps a Tensor \[8, 8\] in a hook of a parameter",
    marked: r"parameter.main_copy",
    averaged: r"average\.",
    foreign: "in its state",
}


@pytest.mark.parametrize(("put", "why"), PUT_ON.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_what_was_put_on_an_optimizer_is_refused_before_training(put, why):
    optimizer = optim.AdamW(net().parameters())
    put(optimizer)
    with pytest.raises(ValueError, match=why) as error:
        check_optimizer(optimizer)
    assert "null_space" in str(error.value)


@pytest.mark.parametrize("put", PUT_ON, ids=lambda each: each.__name__)
def test_what_is_put_on_it_later_leaves_events_out(put):
    model = net()
    optimizer = optim.AdamW(model.parameters())
    check_optimizer(optimizer)
    train(model, optimizer)
    put(optimizer)
    kept = [p.detach().clone() for p in model.parameters()]
    report = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer).teleport([BATCH], loss)
    assert report.stopped_because == "nothing_movable"
    assert all(map(torch.equal, model.parameters(), kept))


def test_schedules_and_what_knows_the_model_are_not_in_the_way():
    model = net()
    optimizer = optim.AdamW(model.parameters())
    LambdaLR(optimizer, lambda step: 1.0)
    optimizer.model = model
    train(model, optimizer, 1)
    assert hidden(optimizer) == ""


def test_all_that_is_held_comes_once():
    inner = [1, "two", (three := object())]
    inner.append(inner)
    assert [value for _, value in reach([("a", inner), ("b", {"c": inner})])] == [inner, {"c": inner}, three]
