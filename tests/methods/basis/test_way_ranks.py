"""The way home with several processes, each with the whole model or with its shards."""

import pytest
import torch

from hf_teleport import TeleportConfig, Teleporter

import ranks


def loss_fn(model, batch):
    return model(**batch).loss


def home(rank, size, shard):
    """The weights before two events with a training step after each, after them, and turned back; and what was turned."""
    model = ranks.llama(torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    if shard and size > 1:
        model = ranks.sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = Teleporter(model)
    batches = ranks.tokens(rank, size)
    found = [ranks.flat(model)]
    for seed in range(2):
        teleporter.config = TeleportConfig(method="basis", basis="random", seed=seed)
        assert teleporter.teleport(batches[:1], loss_fn).steps
        loss_fn(model, batches[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found.append(ranks.flat(model))
    kinds = sorted({report.kind for report in teleporter.turn_back() if not report.reason})
    return [*found, ranks.flat(model)], kinds


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "fsdp2"])
def test_two_processes_come_home_as_one_does(tmp_path, shard):
    ((alone, kinds),) = ranks.run(home, 1, tmp_path, shard)
    both = ranks.run(home, 2, tmp_path, shard)
    assert kinds == ["stream", "value_output"]
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(alone[2], alone[0], atol=1e-12, rtol=1e-12)
    for weights, own in both:
        assert own == kinds
        assert all(torch.equal(a, b) for a, b in zip(weights, both[0][0], strict=True))
        for a, b in zip(weights, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
