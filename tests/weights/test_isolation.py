import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_teleport.weights.isolation import evaluation_mode, full_precision, preserved_rng, seed_everything
from hf_teleport.weights.snapshot import Snapshot


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_are_preserved_even_by_an_error():
    seed_everything(3)
    expected = draws()
    seed_everything(3)

    @preserved_rng()
    def failing():
        seed_everything(99)
        draws()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert draws() == expected


def test_evaluation_mode_restores_each_module_and_buffer():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    model[2].eval()
    saved = [buffer.clone() for buffer in model.buffers()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        model[0].running_mean.add_(1)
        model[0].num_batches_tracked.add_(1)
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), saved, strict=True))


def test_snapshot():
    layer = nn.Linear(4, 3)
    snapshot = Snapshot(layer.parameters())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1e-7)
    assert snapshot.changed().keys() == {layer.weight}
    snapshot.restore()
    assert snapshot.changed() == {}
    assert torch.equal(layer.weight, before)


def test_a_buffer_that_is_replaced_comes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

    model = Counting()
    count = model.count
    with evaluation_mode(model):
        model.count = model.count + 1
    assert model.count is count
    assert model.count.item() == 0


def test_a_module_that_does_more_than_set_a_flag_is_left_as_it_was():
    class Merging(nn.Module):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    for mode in (True, False):
        model = Merging().train(mode)
        with evaluation_mode(model):
            assert model.merged
        assert (model.training, model.merged) == (mode, not mode)


def test_full_precision_inside_autocast_and_inside_a_wrapped_forward():
    model = nn.Linear(3, 2)
    plain = model.forward
    model._original_forward = plain
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)
    wrapped = model.forward
    with torch.autocast("cpu", torch.bfloat16), full_precision(model):
        assert model(torch.randn(1, 3)).dtype == torch.float32
    assert model.forward is wrapped
    assert model(torch.randn(1, 3)).dtype == torch.bfloat16


def test_a_snapshot_brings_the_optimizers_state_back_even_if_it_was_dropped():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in layer.parameters()}
    snapshot = Snapshot(layer.parameters(), optimizer.state)
    optimizer.state[layer.weight]["exp_avg"].fill_(7)
    optimizer.state.pop(layer.bias)
    snapshot.restore()
    for parameter, kept in before.items():
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in kept.items())


def test_tf32_is_off_inside_and_back_after():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with full_precision(nn.Linear(2, 2)):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


def test_restoring_takes_no_memory(monkeypatch):
    """It may be the want of memory that calls for it."""
    weight = nn.Parameter(torch.randn(3, 3))
    state = {weight: {"exp_avg": torch.ones(3, 3), "step": torch.tensor(2.0), "RMS": 0.5}}
    snapshot = Snapshot([weight], state)
    state[weight]["exp_avg"].zero_()
    state[weight]["RMS"] = 1.0
    monkeypatch.setattr("copy.deepcopy", None)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    snapshot.restore()
    assert state[weight]["exp_avg"].sum() == 9
    assert state[weight]["RMS"] == 0.5
