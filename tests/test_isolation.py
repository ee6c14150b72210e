import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_teleport.isolation import Snapshot, evaluation_mode, preserved_rng, seed_everything, shifted


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


def test_shifted_weights_come_back_bit_for_bit_even_by_an_error():
    layer = nn.Linear(4, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    direction = [torch.randn_like(layer.weight), None]

    @shifted(layer.parameters(), direction, 0.1)
    def failing():
        torch.testing.assert_close(layer.weight.detach(), before[0] + 0.1 * direction[0])
        assert torch.equal(layer.bias, before[1])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


def test_snapshot():
    layer = nn.Linear(4, 3)
    snapshot = Snapshot(layer.parameters())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1e-7)
    assert snapshot.changed() == {layer.weight}
    snapshot.restore()
    assert snapshot.changed() == set()
    assert torch.equal(layer.weight, before)
