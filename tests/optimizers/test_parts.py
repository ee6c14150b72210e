"""Several optimizers behind one object."""

from types import SimpleNamespace

import pytest
import torch
from optimizer_catalogue import MuonAndAdamW, by_name
from optimizers import llama
from torch import nn, optim

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.optimizers.parts import groups_of, parts, states, steps_copies
from hf_teleport.optimizers.rehearsal import Rehearsal, RehearsalError
from hf_teleport.optimizers.state import check_optimizer, forget

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # GaLore's


def trained(model, optimizer, steps=2):
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_each_parameter_belongs_to_the_optimizer_that_steps_it():
    model = llama()
    optimizer = MuonAndAdamW(model)
    muon, adam = parts(optimizer)
    assert (type(muon), type(adam)) == (optim.Muon, optim.AdamW)
    groups = groups_of(optimizer)
    assert groups[model.lm_head.weight][0] is adam
    assert groups[model.model.layers[0].mlp.up_proj.weight][0] is muon
    assert len(groups) == len(list(model.parameters()))


def test_states_are_one_mapping():
    model = llama()
    optimizer = MuonAndAdamW(model)
    trained(model, optimizer)
    state, extra = states(optimizer), nn.Parameter(torch.zeros(2))
    assert set(state) == set(model.parameters())
    state[extra] = {"exp_avg": extra.data}
    assert extra in state
    assert all(extra not in part.state for part in parts(optimizer))
    del state[extra], state[model.lm_head.weight]
    assert model.lm_head.weight not in parts(optimizer)[1].state
    with pytest.raises(KeyError):
        state[extra]


def test_one_that_sees_the_basis_is_enough():
    model = llama()
    check_optimizer(MuonAndAdamW(model))
    inside = [p for n, p in model.named_parameters() if p.dim() == 2]
    with pytest.raises(ValueError, match="Muon: its steps are the same in every basis"):
        check_optimizer(optim.Muon(inside))


def test_a_reset_of_some_leaves_the_rest():
    model = llama()
    optimizer = MuonAndAdamW(model)
    trained(model, optimizer)
    forget(optimizer, [model.lm_head.weight])
    assert model.lm_head.weight not in states(optimizer)
    assert len(states(optimizer)) == len(list(model.parameters())) - 1


def test_steps_are_rehearsed_by_each():
    model = llama()
    optimizer = MuonAndAdamW(model)
    trained(model, optimizer)
    parameters = list(model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    before = [p.detach().clone() for p in parameters]
    rehearsal = Rehearsal(optimizer)
    with rehearsal.ahead(parameters, lambda i: gradients, 1):
        rehearsed = [p.detach().clone() for p in parameters]
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, expected in zip(parameters, rehearsed, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_optimizers_in_hooks_are_found():
    pytest.importorskip("galore_torch")
    model = llama()
    optimizer = by_name("galore_adamw_layerwise")(model)
    assert len(parts(optimizer)) == len(list(model.parameters()))
    assert set(groups_of(optimizer)) == set(model.parameters())


class Around(optim.Optimizer):
    """AdamW for the matrices and SGD for the rest, kept in some way; or signs for the rest."""

    def __init__(self, model, hold, read, signs=False):
        self.rest = [p for p in model.parameters() if p.dim() < 2]
        adam = optim.AdamW([p for p in model.parameters() if p.dim() > 1], lr=0.1)
        steps = [adam] if signs else [adam, optim.SGD(self.rest, lr=0.1, momentum=0.9)]
        self.held, self.read, self.signs = hold(steps), read, signs
        super().__init__([group for each in steps for group in each.param_groups], {})
        if signs:
            self.add_param_group({"params": self.rest})

    @torch.no_grad()
    def step(self, closure=None):
        for each in self.read(self.held):
            each.step()
        for parameter in self.rest if self.signs else []:
            parameter.sub_(parameter.grad.sign(), alpha=0.1)


# How optimizers are kept, and read again.
HELD = {
    "lists in a dict": (lambda steps: {"all": steps}, lambda held: held["all"]),
    "pairs": (lambda steps: list(enumerate(steps)), lambda held: [each for _, each in held]),
    "an object": (lambda steps: SimpleNamespace(inside=steps), lambda held: held.inside),
    "a function": (lambda steps: lambda: steps, lambda held: held()),
}


@pytest.mark.parametrize(("hold", "read"), HELD.values(), ids=HELD)
def test_optimizers_are_found_wherever_one_holds_them(hold, read):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = Around(model, hold, read)
    assert [type(part) for part in parts(optimizer)] == [optim.AdamW, optim.SGD]
    trained(model, optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [state["exp_avg"].clone() for state in parts(optimizer)[0].state.values()]
    rehearsal, gradients = Rehearsal(optimizer), [torch.randn_like(p) for p in model.parameters()]
    assert all(step.any() for step in rehearsal.step(list(model.parameters()), gradients))
    with rehearsal.ahead(list(model.parameters()), lambda i: gradients, 2):
        assert not any(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, (state["exp_avg"] for state in parts(optimizer)[0].state.values()), momenta))


def test_one_that_steps_some_weights_beside_another_is_refused():
    # A copy of it would share the other one, whose step is one of the real weights.
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = Around(model, *HELD["pairs"], signs=True)
    trained(model, optimizer)
    with pytest.raises(RehearsalError, match=r"optimizer inside it \(AdamW\).*teleport_rehearsal_steps=0"):
        Rehearsal(optimizer)
    with pytest.raises(ValueError, match="Around steps weights by an optimizer inside it"):
        check_optimizer(optimizer)


def test_lookahead_is_not_rehearsed():
    packages = pytest.importorskip("pytorch_optimizer")
    model = nn.Linear(4, 3)
    with pytest.raises(RehearsalError, match=r"Lookahead steps weights by an optimizer inside it \(AdamW\)"):
        Rehearsal(packages.Lookahead(optim.AdamW(model.parameters())))


def test_an_optimizer_that_knows_its_owner_is_one():
    optimizer = optim.AdamW(nn.Linear(4, 3).parameters())
    optimizer.trainer = SimpleNamespace(optimizer=optimizer, lr_scheduler=optim.lr_scheduler.ConstantLR(optimizer))
    assert parts(optimizer) == [optimizer]
    check_optimizer(optimizer)


def test_copies_of_the_weights_that_are_stepped_in_their_place_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    batch = torch.randn(8, 4)
    for method in ("auto", "basis", "null_space"):
        teleporter = Teleporter(model, TeleportConfig(method=method), optimizer=optim.AdamW(copies))
        with pytest.raises(RehearsalError, match=r"AdamW steps tensors of shape \[4, 4\] that are not the model's"):
            teleporter.check(batch, lambda model, batch: model(batch).square().mean())
    # Those of another model beside this one's, and a weight that is left out, are no copies.
    assert not steps_copies(optim.AdamW([*model.parameters(), *copies]), model.parameters())
    assert not steps_copies(optim.AdamW([model[0].weight]), model.parameters())
