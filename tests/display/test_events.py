"""The one table of events: what card, terminal and page all have in a row."""

import io
import math

from rich.console import Console

from hf_teleport import TeleportConfig
from hf_teleport.display.events import COLUMNS, cells, how_many, total_time
from hf_teleport.training.card import section
from hf_teleport.training.summary import table

EVENT = {"step": 1200, "method": "null_space", "loss_before": 2.0, "loss_after": 2.5, "grad_norm_before": 1.0}
EVENT |= {"grad_norm_after": 3.0, "steps": 5, "moved_share": 0.5, "seconds": 220.0, "stopped_because": "max_growth"}
ROW = ["1,200", "null_space", "2 -> 2.5", "1 -> 3", "5", "50%", "3 min 40 s", "max_growth"]


def test_a_row():
    assert cells(EVENT) == ROW
    assert cells(EVENT | {"rolled_back": True})[-1] == "max_growth, undone"


def test_numbers_that_are_missing_or_not_finite():
    assert dict(zip(COLUMNS, cells({"loss_before": 1.0}), strict=True)) == dict.fromkeys(COLUMNS, "") | {"loss": "1 -> "}
    row = cells(EVENT | {"loss_before": math.nan, "loss_after": None, "grad_norm_after": math.inf})
    assert row[2:4] == ["not finite -> not finite", "1 -> not finite"]


def test_card_and_terminal_have_the_same_row():
    (line,) = [line for line in section(TeleportConfig(), [EVENT]).splitlines() if line.startswith("| 1,200")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ROW
    file = io.StringIO()
    Console(file=file, width=160).print(table([EVENT]))
    assert " ".join(ROW) == " ".join(file.getvalue().splitlines()[-1].split())


def test_totals():
    assert how_many([EVENT, EVENT | {"rolled_back": True}]) == "2, of which 1 undone"
    assert total_time([EVENT, EVENT, {"seconds": None}]) == "7 min 20 s"
