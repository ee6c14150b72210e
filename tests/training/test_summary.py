"""The table of a run's teleports: what it says, when it is shown, and that it fits a terminal."""

import io

import pytest
from rich.console import Console

from hf_teleport import TeleportTrainer
from hf_teleport.cli import main
from hf_teleport.journal import read
from hf_teleport.training.summary import table

from tiny_runs import make, teleports

EVENTS = [
    {"step": 3, "method": "basis", "loss_before": 2.5, "loss_after": 2.5, "grad_norm_before": 1.0, "grad_norm_after": 1.25},
    {"step": 12, "method": "null_space", "loss_before": 2.25, "loss_after": None, "grad_norm_before": 1, "grad_norm_after": 4},
]
EVENTS[0] |= {"steps": 1, "moved_share": 0.5, "seconds": 0.25, "stopped_because": "steps_done", "rolled_back": False}
EVENTS[1] |= {"steps": 0, "moved_share": 0.0, "seconds": 1.5, "stopped_because": "max_loss_change", "rolled_back": True}


def printed(events, width):
    file = io.StringIO()
    Console(file=file, width=width).print(table(events))
    return file.getvalue().splitlines()


def test_a_row_for_each_event():
    title, _, _, *rows = printed(EVENTS, 140)
    assert title.strip() == "Teleports: 2, of which 1 undone; 1.75 s"
    assert [" ".join(row.split()) for row in rows] == [
        "3 basis 2.5 -> 2.5 1 -> 1.25 1 50% 0.25 s steps_done",
        "12 null_space 2.25 -> not finite 1 -> 4 0 0% 1.50 s max_loss_change, undone",
    ]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_nothing_is_cut_where_it_is_narrow(width):
    lines = printed(EVENTS, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_of_many_events_the_first_and_the_last():
    many = [EVENTS[0] | {"step": step} for step in range(21)]
    rows = [line.split()[0] for line in printed(many, 140)[3:]]
    assert rows == [*map(str, range(10)), "...", *map(str, range(11, 21))]
    assert len(printed(many[:20], 140)) == 3 + 20


def test_it_is_shown_at_the_end_and_by_the_command(tmp_path, capsys):
    make(tmp_path, config=teleports("null_space"), disable_tqdm=False).train()
    expected = printed(read(tmp_path)["events"], 140)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-len(expected) :] == expected
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [*expected, f"Written: {tmp_path / 'report.html'}"]


@pytest.mark.parametrize("why", ["disable_tqdm", "no event", "another process"])
def test_it_is_not_shown(why, tmp_path, capsys, monkeypatch):
    if why == "another process":
        monkeypatch.setattr(TeleportTrainer, "is_world_process_zero", lambda self: False)
    config = teleports("null_space", steps=[]) if why == "no event" else teleports("null_space")
    make(tmp_path, config=config, max_steps=3, disable_tqdm=why == "disable_tqdm").train()
    assert "Teleports:" not in capsys.readouterr().out
