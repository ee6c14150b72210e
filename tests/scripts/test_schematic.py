"""The picture of the two ideas: the committed one is what the script draws, and what it draws is true."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import schematic

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawing():
    return ElementTree.fromstring(schematic.picture())


def direction(drawing, kind):
    found = next(line for line in drawing.iter(f"{SVG}line") if line.get("class") == kind)
    x1, y1, x2, y2 = (float(found.get(name)) for name in ("x1", "y1", "x2", "y2"))
    return np.array([x2 - x1, y2 - y1])


def test_the_committed_picture_is_what_the_script_draws():
    assert schematic.PICTURE.read_text(encoding="utf-8") == schematic.picture(), "run: python scripts/schematic.py"


def test_it_has_colours_for_a_dark_page(drawing):
    assert "prefers-color-scheme: dark" in drawing.find(f"{SVG}style").text


def test_the_move_is_orthogonal_to_the_inputs_and_along_the_null_space(drawing):
    inputs, null, move = (direction(drawing, kind) for kind in ("span", "null", "move"))
    length = np.linalg.norm(move)
    assert abs(move @ inputs) < 1e-2 * length * np.linalg.norm(inputs)
    assert move @ null == pytest.approx(length * np.linalg.norm(null), rel=1e-3)


def test_the_turn_takes_the_second_moment_off_the_diagonal(drawing):
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in drawing.iter(f"{SVG}circle") if dot.get("r") == "3"]
    before, after = np.array(dots[:60]) - (560, 190), np.array(dots[60:]) - (810, 190)
    assert np.linalg.norm(before, axis=1) == pytest.approx(np.linalg.norm(after, axis=1), abs=0.2)
    share = [abs(m[0, 1]) / m.trace() for m in (before.T @ before, after.T @ after)]
    assert share[0] > 0.3
    assert share[1] < 1e-3
