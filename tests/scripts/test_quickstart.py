"""The quickstart on tiny sizes: what it prints and draws, and that README shows what it prints."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pandas as pd
import pytest
import quickstart
from datasets import config
from matplotlib.image import imread
from pages import ROOT, blocks
from rich.console import Console

NAMES = list(quickstart.NAMES.values())
TINY = {
    "package_megabytes": 0.05,
    "vocabulary_size": 600,
    "length": 32,
    "sizes": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "train_loss_rows": 4,
    "test_rows": 4,
}


def printed(found):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(quickstart.table(found))
    return captured.get()


def evaluations(losses, seconds):
    return pd.DataFrame({"step": [0, 10, 20], "cpu_seconds": seconds, "train_loss": losses, "test_loss": losses})


def test_the_table_says_where_adamws_loss_is_passed():
    base = evaluations([8.0, 6.0, 5.0], [0.0, 20.0, 40.0])
    text = printed({"AdamW": base, "good": evaluations([8.0, 5.5, 4.5], [0.0, 24.0, 48.0])})
    _, first, second = (line.rstrip() for line in text.splitlines())
    assert first.split()[:4] == ["AdamW", "5.000", "5.000", "40"]
    assert first.endswith("100% of its steps, 100% of its time")
    assert second.split()[:4] == ["good", "4.500", "4.500", "48"]
    assert second.endswith("75% of its steps, 90% of its time")
    assert printed({"AdamW": base, "bad": evaluations([8.0, 7.0, 6.0], [0.0, 20.0, 40.0])}).rstrip().endswith("never")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the quickstart prints, and says on stderr, in 22 steps, and the folder of its plots."""
    folder, out, err = tmp_path_factory.mktemp("quickstart"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(quickstart, "SETTINGS", quickstart.SETTINGS | TINY)
        patch.setattr(sys, "argv", ["quickstart.py", "--output", str(folder), "--steps", "22"])
        quickstart.main()
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue(), folder=folder)


def test_one_bar_a_run_a_table_and_two_plots(run):
    assert "{'" not in run.out + run.err
    finished = [line for line in run.err.replace("\r", "\n").splitlines() if "22/22" in line]
    assert {name for name in NAMES if any(line.startswith(f"{name}: 100%") for line in finished)} == set(NAMES)
    table = run.out[run.out.index("run ") :].splitlines()
    assert [line.split("  ")[0] for line in table[1:3]] == NAMES
    plots = [imread(run.folder / name)[..., :3] for name in ("quickstart.png", "quickstart_dark.png")]
    light, dark = (float(plot.mean()) for plot in plots)
    assert light > 0.8 > 0.3 > dark
    assert "quickstart.png" in run.out


def test_the_readme_shows_what_is_printed(run):
    (shown,) = [block for block in blocks(ROOT / "README.md", "text") if block.startswith("run ")]
    printed_table = run.out[run.out.index("run ") :].splitlines()
    rows = shown.splitlines()
    assert rows[0].split() == printed_table[0].split()
    assert [row.split("  ")[0] for row in rows[1:3]] == NAMES
