"""Random moves in null spaces, and the energy threshold that an allowed loss change leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods import NullSpace
from hf_teleport.methods.null_space.inputs import random_move


def network(rows=60):
    """More rows than the inputs of a layer: no exact null space, but inputs of very unequal energy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    scale = torch.logspace(0, -4, 30, dtype=torch.float64)
    return model, [(scale * torch.randn(rows, 30, dtype=torch.float64), torch.arange(rows) % 4) for _ in range(2)]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def fitted(**settings):
    model, batches = network()
    method = NullSpace(model, cross_entropy, TeleportConfig(**settings))
    for i, batch in enumerate(batches):
        method.survey(method.evaluate(batch, i))
    method.fit()
    return method, model, batches


def test_random_moves_lie_in_the_null_space_and_are_reproducible():
    method, _, _ = fitted(energy_threshold=0.999)
    subspaces = {layer: method.subspaces[layer] for layer in method._moving}
    assert subspaces
    moves, again = (random_move(subspaces, 3) for _ in range(2))
    for layer, move in moves.items():
        assert move.shape == layer.matrix({p: p.detach() for p in layer.parameters}).shape
        torch.testing.assert_close(subspaces[layer].project(move), move)
        assert torch.equal(move, again[layer])
        assert move.norm() > 0


@pytest.mark.parametrize("allowed", [10.0, 0.03, 1e-3, 1e-9])
def test_the_lowest_threshold_that_keeps_the_loss(allowed):
    """Against each threshold by hand: a random move as long as a step, made there."""
    rate = 0.05
    method, model, batches = fitted(energy_threshold=None, max_loss_change=allowed, learning_rate=rate)
    changes = {}
    for tau in (0.99, 0.999, 0.9999, 1.0):
        single, own, _ = fitted(energy_threshold=tau, learning_rate=rate)
        before = cross_entropy(own, batches[0]).item()
        moves = random_move({layer: single.subspaces[layer] for layer in single._moving}, 0)
        length = torch.cat([move.flatten() for move in moves.values()]).norm() if moves else 1.0
        size = torch.cat([p.detach().flatten() for p in single.movable]).norm()
        for layer, move in moves.items():
            layer.add_(move, float(rate * size / length))
        changes[tau] = abs(cross_entropy(own, batches[0]).item() - before) / before
    expected = next((tau for tau, change in changes.items() if change <= allowed), 1.0)
    dims = {layer.name: subspace.null_dim for layer, subspace in method.subspaces.items()}
    single, _, _ = fitted(energy_threshold=expected)
    assert dims == {layer.name: subspace.null_dim for layer, subspace in single.subspaces.items()}
    assert method.trusting == (expected == 1)
    # The weights are where they were.
    fresh, _ = network()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_found_threshold_moves_further_within_the_allowed_change():
    model, batches = network()
    exact = Teleporter(model, TeleportConfig()).teleport(batches, cross_entropy)
    model, batches = network()
    config = TeleportConfig(energy_threshold=None, max_loss_change=0.02)
    found = Teleporter(model, config).teleport(batches, cross_entropy)
    assert found.steps
    assert found.null_dim > 3 * exact.null_dim
    assert 0 < abs(found.loss_after / found.loss_before - 1) <= 0.02
    assert found.grad_norm_after / found.grad_norm_before > 1.05 * exact.grad_norm_after / exact.grad_norm_before


@pytest.mark.parametrize("settings", [{"scope": "batch"}, {"step_size": "fixed"}])
def test_a_threshold_is_found_for_steps_of_known_length_in_one_null_space(settings):
    with pytest.raises(ValueError, match="energy_threshold = None is not allowed"):
        TeleportConfig(energy_threshold=None, **settings)
