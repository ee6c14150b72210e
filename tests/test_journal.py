"""teleports.json: what a run leaves of its teleports, through resumption, full disks and strange files."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.journal import JOURNAL, Journal, read
from hf_teleport.weights.snapshot import Snapshot

from tiny_runs import flat, make, teleports

SAVING = {"save_strategy": "steps", "save_steps": 4}


def two_events(**settings):
    return teleports("null_space", **{"steps": [2, 6], **settings})


def events(folder):
    return [(event["step"], event["method"]) for event in read(folder)["events"]]


def told(reports):
    """What the file should hold of some reports."""
    return [json.loads(json.dumps(report.to_dict())) for report in reports]


def without_place(found):
    return [{name: value for name, value in event.items() if name not in ("step", "epoch")} for event in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of ten steps with two events, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, config=two_events(), **SAVING)
    trainer.train()
    return trainer, folder


def test_every_report_is_kept_whole(whole):
    trainer, folder = whole
    found = read(folder)
    assert events(folder) == [(2, "null_space"), (6, "null_space")]
    assert without_place(found["events"]) == told(trainer.teleport_reports)
    assert found["events"][0]["epoch"] == pytest.approx(2 / 5)
    assert TeleportConfig(**found["config"]) == trainer.teleport_config
    assert found["settled"] is None
    assert (found["model"], found["versions"]["torch"]) == ("LlamaForCausalLM", torch.__version__)
    assert (found["training"]["learning_rate"], found["training"]["lr_scheduler_type"]) == (1e-2, "linear")
    assert not any("token" in name or "dir" in name for name in found["training"])
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize(("checkpoint", "kept"), [(4, 1), (8, 2)])
def test_a_resumed_run_goes_on_with_the_events_before(whole, tmp_path, checkpoint, kept):
    first, folder = whole
    (tmp_path / JOURNAL).write_bytes((folder / JOURNAL).read_bytes())
    resumed = make(tmp_path, config=two_events(steps=[2, 6, 9]), **SAVING)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    assert events(tmp_path) == [(step, "null_space") for step in (2, 6, 9)]
    expected = told(first.teleport_reports[:kept]) + told(resumed.teleport_reports)
    assert without_place(read(tmp_path)["events"]) == expected


def test_another_run_in_the_same_folder_replaces_the_file(whole, tmp_path):
    _, folder = whole
    (tmp_path / JOURNAL).write_bytes((folder / JOURNAL).read_bytes())
    trainer = make(tmp_path, config=two_events(steps=[2]), max_steps=3)
    trainer.train()
    assert without_place(read(tmp_path)["events"]) == told(trainer.teleport_reports)


def test_resumed_in_a_folder_without_the_file(whole, tmp_path, caplog):
    _, folder = whole
    make(tmp_path, config=two_events()).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert events(tmp_path) == [(6, "null_space")]
    assert JOURNAL not in caplog.text


def test_a_file_that_is_spoilt_is_said_and_replaced(whole, tmp_path, caplog):
    _, folder = whole
    (tmp_path / JOURNAL).write_text("{")
    make(tmp_path, config=two_events()).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "is not JSON" in caplog.text
    assert events(tmp_path) == [(6, "null_space")]


def test_each_method_of_an_event_is_one(tmp_path):
    make(tmp_path, config=teleports(), max_steps=3).train()
    assert events(tmp_path) == [(2, "null_space"), (2, "basis")]
    assert [bool(event["symmetries"]) for event in read(tmp_path)["events"]] == [False, True]


def test_what_auto_has_come_to(tmp_path):
    make(tmp_path, config=TeleportConfig(method="auto", num_batches=1, batch_size=2), max_steps=8).train()
    found = read(tmp_path)
    assert (found["config"]["method"], found["settled"]["method"]) == ("auto", found["events"][0]["method"])


def test_without_teleports_there_is_no_file(tmp_path):
    make(tmp_path, config=TeleportConfig(epochs=0), max_steps=2).train()
    assert not (tmp_path / JOURNAL).exists()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.teleport()
    assert not (tmp_path / JOURNAL).exists()


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write_text", "replace", "mkdir"])
def test_a_disk_that_is_full_costs_a_warning(whole, tmp_path, monkeypatch, caplog, call):
    first, _ = whole
    trainer = make(tmp_path, config=two_events())
    monkeypatch.setattr(Path, call, fail)
    trainer.train()
    monkeypatch.undo()
    assert torch.equal(flat(trainer.model), flat(first.model))
    assert caplog.text.count("No space left") == 2
    assert "before step 6" in caplog.text
    assert not list(tmp_path.glob(f"{JOURNAL}*"))


def test_a_disk_that_is_full_for_a_while_leaves_the_old_file_and_then_has_room_for_all(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    trainer.teleport()
    before = (tmp_path / JOURNAL).read_bytes()
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", fail)
        trainer.teleport()
    assert (tmp_path / JOURNAL).read_bytes() == before
    trainer.teleport()
    assert without_place(read(tmp_path)["events"]) == told(trainer.teleport_reports)


@pytest.mark.parametrize("text", ["[]", '{"events": 3}', '{"events": [{}]}', "\x00", ""])
def test_a_file_of_something_else(tmp_path, text):
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(ValueError, match="delete it, or give the file that the run wrote"):
        read(tmp_path)
    Journal().begin(tmp_path, [{"step": 1, "teleport/loss_before": 1.0, "teleport/seconds": 2.0}])


# How far a weight moved.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["null_space", "basis", "level_set"])
def test_how_far_each_weight_moved_against_float64(tmp_path, method, dtype):
    trainer = make(tmp_path, config=teleports(method))
    model = trainer.model.to(dtype)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    report = trainer.teleport()
    after = {name: weight.detach().double() for name, weight in model.named_parameters()}
    assert report.steps
    assert any(layer.moved for layer in report.layers)
    for layer in report.layers:
        name = layer.name if layer.name in before else f"{layer.name}.weight"
        dense = float((after[name] - before[name]).norm() / before[name].norm())
        assert layer.moved_by == pytest.approx(dense, rel=1e-4)
        assert (layer.moved_by > 0) == layer.moved


def test_an_event_that_is_undone_moves_nothing():
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    batch = torch.randn(16, 48), torch.randint(0, 4, (16,))
    config = TeleportConfig(method="null_space", max_growth=None, control="matched_rate")

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = Teleporter(model, config).teleport([batch], loss_fn)
    assert report.rolled_back
    assert {layer.moved_by for layer in report.layers} == {0.0}


@pytest.mark.parametrize(("start", "end", "by"), [(2.0, 3.0, 0.5), (0.0, 1.0, None), (1.0, float("nan"), None)])
def test_a_weight_of_zeros_moves_by_no_known_share(start, end, by):
    weight = nn.Parameter(torch.full((3, 2), start))
    snapshot = Snapshot([weight])
    with torch.no_grad():
        weight.fill_(end)
    assert list(snapshot.changed().values()) == [by if by is None else pytest.approx(by)]


def test_before_an_event_nobody_knows(tmp_path):
    trainer = make(tmp_path)
    (batch,) = trainer._draw(1, event=0).batches
    check = Teleporter(trainer.model).check(batch, trainer._teleport_loss)
    assert {asdict(layer)["moved_by"] for layer in check.layers} == {None}
