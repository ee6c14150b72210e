"""The one table of events: what card, terminal and page all have in a row."""

import io
import math

from rich.console import Console

from hf_teleport import TeleportConfig
from hf_teleport.display.events import COLUMNS, OF_A_TURN, cells, columns, how_many, total_time
from hf_teleport.training.card import section
from hf_teleport.training.summary import table

EVENT = {"step": 1200, "method": "null_space", "loss_before": 2.0, "loss_after": 2.5, "grad_norm_before": 1.0}
EVENT |= {"grad_norm_after": 3.0, "steps": 5, "moved_share": 0.5, "seconds": 220.0, "stopped_because": "max_growth"}
NAMES = [name for name in COLUMNS if name not in OF_A_TURN]
ROW = ["1,200", "null_space", "2 -> 2.5", "1 -> 3", "5", "50%", "3 min 40 s", "max_growth"]


def test_a_row():
    assert cells(EVENT, NAMES) == ROW
    assert cells(EVENT | {"rolled_back": True}, NAMES)[-1] == "max_growth, undone"


def test_numbers_that_are_missing_or_not_finite():
    row = cells({"loss_before": 1.0}, list(COLUMNS))
    assert dict(zip(COLUMNS, row, strict=True)) == dict.fromkeys(COLUMNS, "") | {"loss": "1 -> "}
    row = cells(EVENT | {"loss_before": math.nan, "loss_after": None, "grad_norm_after": math.inf}, list(COLUMNS))
    assert row[2:4] == ["not finite -> not finite", "1 -> not finite"]


def test_card_and_terminal_have_the_same_row():
    (line,) = [line for line in section(TeleportConfig(), [EVENT]).splitlines() if line.startswith("| 1,200")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ROW
    file = io.StringIO()
    Console(file=file, width=160).print(table([EVENT]))
    assert " ".join(ROW) == " ".join(file.getvalue().splitlines()[-1].split())


def test_a_change_of_basis_has_columns_of_its_own():
    turn = EVENT | {"method": "basis", "misalignment": 0.8125, "misalignment_after": 1e-6, "angle": 33.6}
    turn |= {"second_moment_moved": 0.414}
    assert columns([EVENT]) == NAMES
    assert columns([EVENT, turn]) == list(COLUMNS)
    told = dict(zip(COLUMNS, cells(turn, list(COLUMNS)), strict=True))
    assert [told[name] for name in OF_A_TURN] == ["0.812 -> 1e-06", "34°", "41%"]
    # A file has None for what was not measured: no number that is not finite.
    unmeasured = EVENT | dict.fromkeys(("misalignment", "misalignment_after", "angle", "second_moment_moved"))
    assert columns([unmeasured]) == NAMES


def test_totals():
    assert how_many([EVENT, EVENT | {"rolled_back": True}]) == "2, of which 1 undone"
    assert total_time([EVENT, EVENT, {"seconds": None}]) == "7 min 20 s"
