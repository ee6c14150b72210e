"""Several optimizers behind one object."""

import pytest
import torch
from optimizers import MuonAndAdamW, by_name, llama
from torch import nn, optim

from hf_teleport.optimizers.parts import groups_of, parts, states
from hf_teleport.optimizers.rehearsal import Rehearsal
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
