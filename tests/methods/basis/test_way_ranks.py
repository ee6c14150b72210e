"""The way home with several processes, each with the whole model or with its shards."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.event import home as coming_home

import ranks


def loss_fn(model, batch):
    return model(**batch).loss


def moments(optimizer):
    """AdamW's averages of gradients, whole."""
    kept = [state["exp_avg"] for state in optimizer.state.values()]
    return torch.cat([(m.full_tensor() if hasattr(m, "full_tensor") else m).flatten() for m in kept])


def home(rank, size, shard):
    """The weights before two events with a training step after each, after them, and turned back, with AdamW's averages of
    gradients; what was turned; and whether the weights were whole on the way.
    """
    model = ranks.llama(torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    if shard and size > 1:
        model = ranks.sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    teleporter = Teleporter(model, optimizer=optimizer)
    batches = ranks.tokens(rank, size)
    found = [ranks.flat(model)]
    for seed in range(2):
        teleporter.config = TeleportConfig(method="basis", basis="random", seed=seed)
        assert teleporter.teleport(batches[:1], loss_fn).steps
        loss_fn(model, batches[1]).backward()
        if size > 1 and not shard:  # as DDP does
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()
    found += [ranks.flat(model), moments(optimizer)]
    isolated, whole = coming_home.isolated, []

    @contextmanager
    def watched(*args, **named):
        with isolated(*args, **named) as weights:
            whole.append(weights.whole)
            yield weights

    coming_home.isolated = watched
    try:
        kinds = sorted({report.kind for report in teleporter.turn_back() if not report.reason})
    finally:
        coming_home.isolated = isolated
    return [*found, ranks.flat(model), moments(optimizer)], kinds, whole


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "fsdp2"])
def test_two_processes_come_home_as_one_does(tmp_path, shard):
    ((alone, kinds, _),) = ranks.run(home, 1, tmp_path, shard)
    both = ranks.run(home, 2, tmp_path, shard)
    assert kinds == ["stream", "value_output"]
    first, turned, averages, home_again, averages_at_home = alone
    assert not torch.allclose(first, turned, atol=1e-2)
    assert not torch.allclose(averages, averages_at_home, rtol=1e-2, atol=0)
    torch.testing.assert_close(home_again, first, atol=1e-12, rtol=1e-12)
    for found, own, whole in both:
        assert own == kinds
        assert whole == [not shard]
        assert all(torch.equal(a, b) for a, b in zip(found, both[0][0], strict=True))
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
