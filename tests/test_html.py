"""`hf-teleport report`: one file that opens anywhere, whose numbers are the run's, and that no name can break."""

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from hf_teleport import TeleportConfig, html
from hf_teleport.cli import main
from hf_teleport.display.quantities import duration
from hf_teleport.html import render
from hf_teleport.journal import JOURNAL, read
from hf_teleport.lab.plot import figure
from hf_teleport.lab.report import FIGURE, NUMBERS, RECORD
from hf_teleport.lab.verdict import REFERENCE, Interval, Verdict
from hf_teleport.reporting import extras

from tiny_runs import make, teleports

STATE = "trainer_state.json"
SAVING = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 5}
NASTY = """<script>alert("x")</script> & 'y' ]]> \x01 "z" é"""


class Page:
    """A report, read as strict XML and as HTML."""

    VOID = ("meta", "img", "source")

    def __init__(self, text):
        assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
        self.text = text
        self.root = ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
        tags, opened = [], []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: (opened.append(tag), tags.append((tag, dict(attributes))))
        parser.handle_startendtag = lambda tag, attributes: tags.append((tag, dict(attributes)))
        parser.handle_endtag = lambda tag: opened.remove(tag)
        parser.feed(text)
        assert not opened
        self.tags = tags

    def words(self, tag):
        return ["".join(element.itertext()).strip() for element in self.root.iter(tag)]

    def table(self, caption):
        """The rows of the table whose caption has these words, the names of the columns first."""
        (found,) = [table for table in self.root.iter("table") if caption in "".join(table.find("caption").itertext())]
        return [["".join(cell.itertext()) for cell in row] for row in found.iter("tr")]

    def facts(self):
        return dict(zip(self.words("dt"), self.words("dd"), strict=True))

    def images(self):
        """Those for light pages, decoded."""
        return [decoded(attributes["src"]) for tag, attributes in self.tags if tag == "img"]


def decoded(uri):
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    return image


def assert_opens_anywhere(page):
    """Offline, without scripts, and for who listens to it."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            assert attributes.get(name, "data:image/png;").startswith("data:image/png;")
        if tag == "img":
            assert len(attributes["alt"]) > 20
        if tag == "source":
            assert attributes["media"] == "(prefers-color-scheme: dark)"
            decoded(attributes["srcset"])
    (style,) = page.words("style")
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"@import|url\(|https?:", style)
    assert page.words("title") == page.words("h1")
    for table in page.root.iter("table"):
        assert len("".join(table.find("caption").itertext())) > 10
        width = len(table.find("thead/tr"))
        assert all(cell.tag == "th" and cell.get("scope") == "col" for cell in table.find("thead/tr"))
        for row in table.iter("tr"):
            assert len(row) == width
        for row in table.find("tbody"):
            assert (row[0].tag, row[0].get("scope")) == ("th", "row")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two events of two methods each, cut after the first and resumed."""
    folder = tmp_path_factory.mktemp("run")
    settings = teleports(steps=[2, 6])
    make(folder, config=settings, **SAVING).train()
    shutil.rmtree(folder / "checkpoint-10")
    shutil.rmtree(folder / "checkpoint-8")
    resumed = make(folder, config=settings, **SAVING)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed.save_state()
    return folder


@pytest.fixture(scope="module")
def page(run):
    return Page(render(run))


def test_it_opens_anywhere(page):
    assert_opens_anywhere(page)
    assert len(page.images()) == 5


def test_events_are_those_of_the_reports(run, page):
    columns, *rows = page.table("One row for each teleport")
    events = read(run)["events"]
    assert [(row[0], row[1]) for row in rows] == [(step, method) for step in "26" for method in ("null_space", "basis")]
    for row, event in zip(rows, events, strict=True):
        told = dict(zip(columns, row, strict=True))
        for column, name, form in (
            ("moved", "moved_share", ".0%"),
            ("steps", "steps", "d"),
        ):
            assert told[column] == format(event[name], form)
        assert told["loss"] == f"{event['loss_before']:.6g} -> {event['loss_after']:.6g}"
        assert told["gradient norm"] == f"{event['grad_norm_before']:.4g} -> {event['grad_norm_after']:.4g}"
        assert told["time"] == duration(event["seconds"])
        assert told["stopped because"] == event["stopped_because"]


def test_layers_are_those_of_the_reports(run, page):
    for event in read(run)["events"]:
        columns, *rows = page.table(f"Weights of the teleport before step {event['step']}, {event['method']}")
        assert columns == ["layer", "role", "shape", "null dimensions", "moved by", "why it stayed"]
        assert [row[0] for row in rows] == [layer["name"] for layer in event["layers"]]
        for row, layer in zip(rows, event["layers"], strict=True):
            room = "" if layer["null_dim"] is None else f"{layer['null_dim']} of {layer['input_dim']}"
            shape = " x ".join(map(str, layer["shape"]))
            assert row[1:] == [layer["role"], shape, room, f"{layer['moved_by']:.4g}", layer["reason"]]
    symmetries = read(run)["events"][1]["symmetries"]
    _, *rows = page.table("Symmetries of the teleport before step 2, basis")
    assert [row[0] for row in rows] == [symmetry["name"] for symmetry in symmetries]
    expected = [(s["misalignment"], s["misalignment_after"], s["angle"]) for s in symmetries]
    told = [("", "") if b is None else (f"{b:.3g} -> {a:.3g}", f"{angle:.0f}°") for b, a, angle in expected]
    assert [(row[4], row[5]) for row in rows] == told


def test_summary_settings_and_versions(run, page):
    facts = page.facts()
    assert (facts["Model"], facts["Steps"], facts["Teleports"]) == ("LlamaForCausalLM", "10 of 10", "4")
    log = json.loads((run / STATE).read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert facts["Training loss"] == f"{losses[0]:.6g} at first, {losses[-1]:.6g} at last"
    assert eval(page.words("pre")[0], {"TeleportConfig": TeleportConfig}) == teleports(steps=[2, 6])
    settings = dict(page.table("Settings of teleportation"))
    assert settings["num_batches"] == "2"
    changed = [row[0].text for row in page.root.iter("tr") if row.get("class") == "changed"]
    assert "batch_size" in changed
    assert "max_growth" not in changed
    assert dict(page.table("Settings of training"))["learning_rate"] == "0.01"
    assert dict(page.table("What the run was made with"))["hf_teleport"] == read(run)["versions"]["hf_teleport"]


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without pictures, for what the text says: drawing takes longer than all else."""
    monkeypatch.setattr(html, "_drawn", lambda *_: None)


def altered(run, tmp_path, change):
    """A copy of the run's two files with another file of teleports."""
    found = read(run)
    change(found)
    (tmp_path / JOURNAL).write_text(json.dumps(found))
    shutil.copy(run / STATE, tmp_path)
    return Page(render(tmp_path))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_name_breaks_the_page(run, tmp_path):
    folder = tmp_path / "a <b> & 'c'"
    folder.mkdir()

    def change(found):
        found["model"] = NASTY
        found["config"]["exclude_modules"] = [NASTY]
        found["events"][0]["method"] = NASTY
        for event in found["events"]:
            event["layers"][1]["name"] = event["layers"][0]["reason"] = NASTY
            for symmetry in event["symmetries"]:
                symmetry["name"] = symmetry["reason"] = NASTY

    page = altered(run, folder, change)
    assert_opens_anywhere(page)
    assert page.words("h1") == ["Teleports of a <b> & 'c'"]
    seen = NASTY.replace("\x01", "\ufffd")
    assert page.facts()["Model"] == seen
    assert page.table("Weights of the teleport before step 6, basis")[2][0] == seen
    assert page.text.count("&lt;script&gt;") > 5


@pytest.mark.usefixtures("undrawn")
def test_numbers_that_are_not_finite_and_an_event_that_was_undone(run, tmp_path):
    def change(found):
        event = found["events"][2]
        event.update(loss_after=None, grad_norm_before=None, rolled_back=True)
        event["layers"][1].update(moved_by=None)

    page = altered(run, tmp_path, change)
    row = page.table("One row for each teleport")[3]
    assert row[2].endswith(" -> not finite")
    assert row[3].startswith("not finite -> ")
    assert row[-1].endswith(", undone")
    assert page.facts()["Teleports"] == "4, of which 1 undone"
    assert page.table("Weights of the teleport before step 6, null_space")[2][4] == "unknown"


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_going_on_is_told_from_its_last_checkpoint(run, tmp_path):
    for name in ("checkpoint-4", "checkpoint-8", "checkpoint-10"):
        (tmp_path / name).mkdir()
        shutil.copy(run / name / STATE, tmp_path / name)
    (tmp_path / "checkpoint-10" / STATE).write_text('{"log_hist')  # cut short
    shutil.copy(run / JOURNAL, tmp_path)
    page = Page(render(tmp_path))
    assert page.facts()["Steps"] == "8 of 10"
    assert len(page.table("One row for each teleport")) == 1 + 4


@pytest.mark.usefixtures("undrawn")
def test_events_that_the_last_checkpoint_does_not_know_yet(run, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    shutil.copy(run / "checkpoint-4" / STATE, tmp_path / "checkpoint-4")
    shutil.copy(run / JOURNAL, tmp_path)
    assert [row[0] for row in Page(render(tmp_path)).table("One row for each teleport")[1:]] == ["2", "2", "6", "6"]


def test_events_of_an_older_run_in_the_same_folder_are_not_told(run, tmp_path):
    shutil.copy(run / JOURNAL, tmp_path)
    trainer = make(tmp_path, config=TeleportConfig(epochs=0), max_steps=9)
    trainer.train()
    trainer.save_state()
    page = Page(render(tmp_path))
    assert page.facts()["Teleports"] == "0"
    assert "No teleport was made." in page.words("p")


def test_without_the_file_the_log_tells_the_events(run, page, tmp_path):
    shutil.copy(run / STATE, tmp_path)
    found = Page(render(tmp_path))
    assert_opens_anywhere(found)
    assert found.table("One row for each teleport") == page.table("One row for each teleport")
    assert any(f"There is no {JOURNAL}" in text for text in found.words("p"))
    assert len(found.images()) == 1


def test_without_a_log_the_file_tells_the_events(run, tmp_path):
    shutil.copy(run / JOURNAL, tmp_path)
    page = Page(render(tmp_path))
    assert_opens_anywhere(page)
    assert len(page.images()) == 4
    assert any(f"There is no {STATE}" in text for text in page.words("p"))


@pytest.mark.usefixtures("undrawn")
def test_of_very_many_events_the_layers_of_some_are_told(run, tmp_path):
    def change(found):
        found["events"] = [{**found["events"][0], "step": 100 + i, "seconds": float(i)} for i in range(30)]

    page = altered(run, tmp_path, change)
    assert len(page.table("One row for each teleport")) == 1 + 30 + 4  # those of the log too
    assert sum(text.startswith("the teleport before") for text in page.words("summary")) < 21
    assert any("first and the last 10 events" in text for text in page.words("p"))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it_and_asks_nobody(run, tmp_path):
    (tmp_path / "report.html").write_text(render(run), encoding="utf-8")
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    words += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=500,900 --dump-dom"
    probe = tmp_path / "page.html"
    # What a narrow screen makes of it, measured by the browser: a script of the test's, for the report has none.
    measure = (
        "d=document;d.title=[d.documentElement.scrollWidth<=innerWidth,[...d.images].every(i=>i.complete&&i.naturalWidth>300),"
        "performance.getEntriesByType('resource').every(e=>e.name.startsWith('data:'))]"
    )
    probe.write_text(f"{(tmp_path / 'report.html').read_text(encoding='utf-8')}<script>onload=()=>{{{measure}}}</script>")
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *words.split(), *offline, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "<title>true,true,true</title>" in done.stdout
    assert done.stdout.count("<details") == Page(render(run)).text.count("<details")
    assert "CONSOLE" not in done.stderr


# --- a comparison ---------------------------------------------------------------------------------------------------------


def verdicts():
    fixed = {"seeds": 3, "never": 0, "diverged": 0}
    one, zero = Interval(1.0, 0.0, 3), Interval(0.0, 0.0, 3)
    names = ("train_loss", "time", "time_to_loss", "equal_time", "equal_samples", "test_loss", "metric")
    reference = dict.fromkeys(names, zero) | {"time": one, "train_loss": Interval(0.5, 0.01, 3)}
    other = dict.fromkeys(names, Interval(0.25, 0.013, 3)) | {"test_loss": Interval(float("nan"), None, 3)}
    return [
        Verdict("baseline", 0.1, **fixed, **reference, word=REFERENCE),
        Verdict('<arm> & "co"', 0.3, **fixed, **other, word="worse"),
    ]


@pytest.fixture
def comparison(tmp_path):
    """What `hf-teleport compare` leaves, of numbers of our own."""
    record = {
        "clock": "cpu_seconds",
        "learning_rates": [0.1, 0.3],
        "seeds": [0, 1, 2],
        "best_learning_rates": {"baseline": 0.1, '<arm> & "co"': None},
        "remarks": [],
        "verdicts": json.loads(json.dumps([asdict(v) for v in verdicts()]).replace("NaN", "null")),
        "sentences": ["<arm> is worse & slower."],
    }
    (tmp_path / RECORD).write_text(json.dumps(record))
    (tmp_path / NUMBERS).write_text("arm\n")
    frame = {"arm": ["a"] * 2, "learning_rate": [0.1] * 2, "step": [0, 1], "train_loss": [2.0, 1.0], "train_loss_sd": [0.1, 0.1]}
    figure(pd.DataFrame(frame), {"best": {"a": 0.1}}, {"step": "step"}).savefig(tmp_path / FIGURE)
    return tmp_path


def test_a_comparison(comparison):
    page = Page(render(comparison))
    assert_opens_anywhere(page)
    assert page.words("li") == ["<arm> is worse & slower."]
    columns, first, second = page.table("Arms minus the baseline")
    assert columns[0] == "arm"
    assert first == ["baseline", "0.1", "0.500 ± 0.010", "x 1", *[""] * 6, "reference"]
    assert second[:4] == ['<arm> & "co"', "0.3", "0.250 ± 0.013", "x 0.250 ± 0.013"]
    assert (second[6], second[8], second[-1]) == ("+0.250 ± 0.013", "-", "worse")
    assert page.facts()["Best rates"] == 'baseline: 0.1; <arm> & "co": none'
    (image,) = page.images()
    assert image.size == Image.open(comparison / "comparison.png").size


def test_a_comparison_without_its_picture(comparison):
    (comparison / "comparison.png").unlink()
    page = Page(render(comparison))
    assert not page.images()
    assert_opens_anywhere(page)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"verdicts": [{}]}'])
def test_a_comparison_that_is_spoilt(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match="start that command again"):
        render(tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file(run, tmp_path, capsys):
    shutil.copy(run / JOURNAL, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"\nWritten: {tmp_path / 'report.html'}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", JOURNAL]
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == first


def test_what_is_wrong_is_said(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["nowhere"], "there is no folder 'nowhere': give the output_dir"),
        ([str(tmp_path / "empty")], f"it has no {JOURNAL}, no {STATE} (there or in a checkpoint) and no comparison.json. Give"),
        ([str(run), "--output", str(tmp_path)], "is a folder; allowed: a file"),
        ([str(run), "--output", str(tmp_path / "no" / "x.html")], "for x.html: make it"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / JOURNAL).write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert not list(Path(tmp_path).rglob("*.html*"))


def test_without_matplotlib_the_way_out_is_said(run, tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")

    monkeypatch.setattr(extras, "import_module", missing)
    assert main(["report", str(run), "--output", str(tmp_path / "x.html")]) == 2
    assert "pip install 'hf_teleport[experiments]'" in capsys.readouterr().err
