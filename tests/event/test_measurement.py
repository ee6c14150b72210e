import math

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig
from hf_teleport.event.measurement import measure
from hf_teleport.methods import METHODS


def squared(model, batch):
    return model(batch).square().mean()


def method():
    return METHODS["null_space"](nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double(), squared, TeleportConfig())


def test_losses_and_the_norm_of_the_mean_gradient():
    own, batches, seen = method(), list(torch.randn(3, 5, 4).double()), []
    found = measure(own, batches, seen.append)
    losses = [squared(own.model, batch) for batch in batches]
    gradients = torch.autograd.grad(sum(losses) / 3, list(own.model.parameters()))
    assert found.losses == pytest.approx([loss.item() for loss in losses])
    assert found.loss == pytest.approx(sum(found.losses) / 3)
    assert found.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item())
    assert found.grad_norms == pytest.approx([point.grad_norm for point in seen])
    assert found.finite


def test_it_ends_at_a_batch_that_is_not_finite():
    batches, seen = list(torch.randn(3, 5, 4).double()), []
    batches[1][0, 0] = math.inf
    found = measure(method(), batches, seen.append)
    assert len(found.losses) == 2
    assert len(seen) == 1
    assert not found.finite
