"""The page of settings says what the code says."""

import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import settings_page

from hf_teleport import TeleportConfig


def test_the_committed_page_is_what_the_script_makes():
    assert settings_page.PAGE.read_text() == settings_page.page(), "run: python scripts/settings_page.py"


def test_every_setting_has_a_row_of_five_cells():
    rows = [line.replace(r"\|", "") for line in settings_page.page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [setting.name for setting in fields(TeleportConfig)]
    assert all(row.count("|") == 6 for row in rows)
