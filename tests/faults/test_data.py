"""Data that cannot be read or collated, before training, at a teleport or by hand; and batches that are too small."""

import random
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.lab.data import ImageTensors

from faulty import Scene, images, net_loss, rows, trained, trainer, weights


def test_a_batch_without_samples_is_no_move():
    scene = Scene()
    empty = {name: value[:0] for name, value in scene.batches[0].items()}
    for batches in ([empty], [*scene.batches, empty]):
        report = scene.teleport(batches=batches)
        assert report.stopped_because == "non_finite"
        assert scene.untouched()
    report = scene.teleport(held_back=empty)  # nothing to watch
    assert report.steps
    scene.assert_sound()


class Experts(nn.Module):
    """A row goes to the expert of its sign."""

    def __init__(self):
        super().__init__()
        self.below, self.experts, self.above = nn.Linear(48, 32), nn.ModuleList(nn.Linear(32, 32) for _ in "ab"), nn.Linear(32, 4)

    def forward(self, x, labels):
        y = torch.tanh(self.below(x))
        signs = [x[:, 0] < 0, x[:, 0] >= 0]
        parts = [expert(y[sign]) for expert, sign in zip(self.experts, signs, strict=True)]
        return nn.functional.cross_entropy(self.above(torch.tanh(torch.cat(parts))), torch.cat([labels[sign] for sign in signs]))


@pytest.mark.parametrize("scope", ["joint", "batch"])
def test_a_layer_that_gets_no_rows_stays(scope):
    model, batch = Experts(), rows(6, 1)
    batch["x"][:, 0] = -1
    idle = weights(model.experts[1])
    before = float(model(**batch).detach())
    report = Teleporter(model, TeleportConfig(scope=scope, max_growth=None)).teleport([batch], net_loss)
    moved = {layer.name: layer.moved for layer in report.layers}
    assert moved == {"below": False, "experts.0": True, "experts.1": False, "above": True}
    assert torch.equal(weights(model.experts[1]), idle)
    assert float(model(**batch).detach()) == pytest.approx(before, rel=1e-4)


class Failing(ImageTensors):
    """Rows of which the n-th that is drawn cannot be read."""

    def __init__(self, at):
        super().__init__(images().images, images().labels)
        self.at, self.drawn = at, count(1)

    def __getitem__(self, index):
        if next(self.drawn) == self.at:
            raise OSError("no such file")
        return super().__getitem__(index)


@contextmanager
def fails(match, kind=OSError):
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(kind, match=match):
        yield
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == rng[1:]


def test_a_row_that_cannot_be_read_is_found_before_training(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at=3)})
    before = weights(run.model)
    with pytest.raises(OSError, match="no such file"):
        run.train()
    assert run.state.global_step == 0
    assert torch.equal(weights(run.model), before)


def test_a_row_that_cannot_be_read_at_the_teleport_leaves_the_weights_of_that_step(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at=10 + 8)})
    with pytest.raises(OSError, match="no such file"):
        run.train()
    assert run.state.global_step == 6
    assert torch.equal(weights(run.model), trained(tmp_path, max_steps=6))
    assert run.model.training


@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_row_that_cannot_be_read_for_a_teleport_by_hand(tmp_path, at):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at)})
    before = weights(run.model)
    with fails("no such file"):
        run.teleport()
    assert torch.equal(weights(run.model), before)
    assert run.teleport().steps


def test_a_collator_that_fails(tmp_path):
    def collate(rows):
        torch.rand(1), random.random(), np.random.rand()
        raise OSError("these rows do not fit together")

    run = trainer(tmp_path, made={"data_collator": collate})
    before = weights(run.model)
    with fails("do not fit"):
        run.teleport()
    assert torch.equal(weights(run.model), before)


def test_fewer_rows_than_one_batch(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": images().first(3)})
    seen = []
    run._teleport_loss = lambda model, batch, real=run._teleport_loss: (seen.append(len(batch["labels"])), real(model, batch))[1]
    run.train()
    assert set(seen) == {3}
    assert run.teleport_reports[0].steps
    assert run.state.global_step == 12
