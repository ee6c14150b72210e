"""Memory that runs out: the event is made again with smaller batches, or skipped, and training goes on."""

from itertools import count

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer

from faulty import METHODS, Scene, broken, looks, out_of_memory, raising, rows, trained, trainer, weights


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_runs_out_once_is_made_up_for_with_smaller_batches(method):
    for at in looks(method):
        scene, sizes = Scene(method), []

        def loss(model, batch, scene=scene, sizes=sizes):
            sizes.append(len(batch["labels"]))
            return scene.loss(model, batch)

        report = scene.teleport(broken(loss, raising(out_of_memory()), at))
        assert report.steps, at
        assert not scene.untouched(), at
        assert set(sizes[:at]) == {8}, at
        assert set(sizes[at:]) == {4}, at
        scene.assert_sound(held_back=False)  # of which only half was watched


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [None, {"names": ["a"]}], ids=["smaller_and_smaller", "cannot_be_cut"])
def test_memory_that_always_runs_out_costs_the_event(caplog, method, batch):
    scene = Scene(method)
    batches = [{**own, **(batch or {})} for own in scene.batches]
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["labels"]))
        raise out_of_memory()

    report = scene.teleport(loss, batches)
    assert sizes == ([8] if batch else [8, 4, 2, 1])
    assert (report.stopped_because, report.rolled_back) == ("out_of_memory", True)
    assert "memory ran out, with smaller batches too" in caplog.text
    scene.assert_untouched()


def test_memory_that_runs_out_with_more_than_two_samples():
    scene = Scene()

    def loss(model, batch):
        if len(batch["labels"]) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return scene.loss(model, batch)

    assert scene.teleport(loss).steps
    scene.assert_sound(held_back=False)


def test_memory_that_runs_out_where_a_batch_is_a_tensor():
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    calls = count(1)

    def loss(model, x):
        if next(calls) == 2:
            raise out_of_memory()
        return model(x).square().mean()

    teleporter = Teleporter(model, TeleportConfig(max_loss_change=1.0))
    assert teleporter.teleport([rows(8, 1)["x"]], loss, rows(8, 2)["x"]).steps


class NoMemory(TeleportTrainer):
    def _teleport_loss(self, model, batch):
        raise out_of_memory()


class NoMemoryForData(TeleportTrainer):
    """Memory runs out when the batches of a teleport are moved to the device."""

    teleporting = False

    def teleport(self):
        self.teleporting = True
        try:
            return super().teleport()
        finally:
            self.teleporting = False

    def _prepare_inputs(self, inputs):
        if self.teleporting:
            raise out_of_memory()
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("kind", [NoMemory, NoMemoryForData])
def test_without_memory_for_a_teleport_training_goes_on_with_its_own_batch_size(tmp_path, kind, smaller):
    run = trainer(tmp_path, kind, auto_find_batch_size=smaller)
    run.train()
    assert run._train_batch_size == 8
    assert [report.stopped_because for report in run.teleport_reports] == ["out_of_memory"]
    assert torch.equal(weights(run.model), trained(tmp_path))


def test_too_little_memory_before_training_is_not_taken_for_bad_data(tmp_path, caplog):
    trainer(tmp_path, NoMemory, TeleportConfig(method="null_space", num_batches=1), max_steps=1).train()
    assert "memory" in caplog.text
    assert "Check the data" not in caplog.text
