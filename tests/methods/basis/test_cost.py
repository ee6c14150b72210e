"""What a change of basis takes, said before it runs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods.basis.cost import decompositions, longest, moment_bytes
from hf_teleport.report import SymmetryReport

from tiny_models import build, loss_fn

CPU = torch.device("cpu")


def symmetry(blocks, size, kind="value_output"):
    return SymmetryReport(kind, f"{blocks} of {size}", blocks, size, 2)


@pytest.fixture
def each_takes_a_second(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))


def test_the_longest_decomposition_first_and_each_to_whom_has_the_least_to_do(each_takes_a_second):
    listed = [symmetry(3, 16), symmetry(1, 48, "stream"), symmetry(2, 16), symmetry(900, 1, "scaling")]
    planned = decompositions(listed, 2, CPU)
    assert [(each.symmetry.size, each.process) for each in planned[:3]] == [(16, 1), (48, 0), (16, 1)]
    assert [each.seconds for each in planned] == [3, 1, 2, 0]
    assert longest(planned) == 5
    assert longest(decompositions(listed, 1, CPU)) == 6
    assert longest([]) == 0


def test_a_large_matrix_is_judged_by_a_smaller_one(each_takes_a_second, monkeypatch):
    monkeypatch.setattr("hf_teleport.methods.basis.cost._TRIED", 32)
    (planned,) = decompositions([symmetry(1, 4096, "stream")], 1, CPU)
    assert planned.seconds == 128**3


def test_an_event_is_its_passes_its_turn_and_its_decompositions(each_takes_a_second):
    model, batch = build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    cost = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer).check(batch, loss_fn).cost
    # Weights and Adam's two averages, copied and turned, the averages compared, and the gradients turned and compared.
    assert (cost.pass_seconds, cost.look_seconds, cost.turn_seconds) == (1, 1, 7)
    assert cost.event_seconds == 2 + 7 + cost.decomposition_seconds
    assert cost.of_run(events=3, looks=7) == 3 * cost.event_seconds + 7
    without = Teleporter(model, TeleportConfig(method="basis", track_every=0, num_batches=3)).check(batch, loss_fn).cost
    assert (without.look_seconds, without.turn_seconds) == (0, 3)
    assert without.event_seconds == 6 + 3 + without.decomposition_seconds


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_event_holds_no_more_than_was_said(optimizer_class):
    """The most that is allocated at once in an event, beside what one pass over the batch allocates."""
    model, _ = build("llama", dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    loss_fn(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    teleporter = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer)
    said = teleporter.check(batch, loss_fn).cost.event_bytes
    teleporter.teleport([batch], loss_fn)

    def peak(work):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(sum(size for _, size in changes[: i + 1]) for i in range(len(changes)))

    def one_pass():
        loss_fn(model, batch).backward()
        optimizer.zero_grad()

    held = peak(lambda: teleporter.teleport([batch], loss_fn))
    assert held - peak(one_pass) <= said
    assert held >= said / 2
    assert said > moment_bytes([symmetry(1, model.config.hidden_size)])
