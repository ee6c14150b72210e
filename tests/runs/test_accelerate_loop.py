"""A loop of one's own with Accelerate, in one process and in two: what it wraps goes into the Teleporter as it is."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from hf_teleport import TeleportConfig, Teleporter

from ranks import run
from tiny_runs import Texts, flat, llama, pad

METHODS = ["null_space", "basis"]


def loss_fn(model, batch):
    return model(**batch).loss


def trained(method, processes, precision=None):
    """Eight micro-batches, two to a step; an event before the third step."""
    AcceleratorState._reset_state(reset_partial_state=processes == 1)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, mixed_precision=precision)
    torch.manual_seed(0)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Texts(8 * processes).rows, batch_size=1, collate_fn=pad)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    teleporter = Teleporter(model, TeleportConfig(steps_per_batch=2).for_method(method), optimizer=optimizer)
    report, step, losses = None, 0, []
    for batch in loader:
        if step == 2 and report is None:
            before = flat(model)
            report = teleporter.teleport([batch], loss_fn)
            moved = not torch.equal(before, flat(model))
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        losses.append(loss.detach())
    return {
        "report": (report.loss_before, report.loss_after, report.steps),
        "moved": moved,
        "weights": flat(model),
        "losses": losses,
    }


def check(outcome):
    before, after, steps = outcome["report"]
    assert steps
    assert outcome["moved"]
    assert after == pytest.approx(before, rel=1e-4)
    assert torch.stack(outcome["losses"]).isfinite().all()


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_one_process(method, precision):
    check(trained(method, 1, precision))
    AcceleratorState._reset_state(reset_partial_state=True)


def both_methods(rank, size):
    return {method: trained(method, size) for method in METHODS}


def test_two_processes_end_with_equal_weights(tmp_path):
    first, second = run(both_methods, 2, tmp_path, joined=False)
    for method in METHODS:
        check(first[method])
        assert first[method]["report"] == second[method]["report"]
        assert torch.equal(first[method]["weights"], second[method]["weights"])
        assert not torch.equal(first[method]["losses"][0], second[method]["losses"][0]), "each had its own rows"
