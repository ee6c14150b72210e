"""The scripts, run as a user runs them, on small portions of real data."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pyarrow import parquet

import forks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "studies"))


def run(script, *words, start=forks.run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
    done = start(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_symmetries_of_some_architectures(tmp_path):
    out = run("zoo/report.py", "symmetries", "llama", "gpt2", "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page in out
    assert "2 architectures, 0 failed. 2 have a symmetry to turn. A residual stream turns in 1 when\ngains are uneven" in page
    assert "transformer.wte.weight reads its output and writes its input" in page


def test_the_cost_of_a_step_after_a_turn():
    out = run("bench/step_cost.py", "--hidden_size", 32, 48, "--layers", 1, "--repeats", 4)
    assert [line.partition(":")[0] for line in out.splitlines()] == ["width 32", "width 48"]
    assert out.count("steps; a reading") == 2


def kept_run(folder, arm, seed, losses, seconds):
    """A finished run as an experiment leaves it."""
    folder = folder / arm / "lr0.1" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"arm": arm, "learning_rate": 0.1, "seed": seed}))
    rows = []
    for i, loss in enumerate(losses):
        at = {"step": i, "seconds": i * seconds, "cpu_seconds": i * seconds}
        rows += [at | {"eval_train_loss": loss}, at | {"eval_test_loss": 2 * loss, "eval_test_accuracy": 0.5}]
    (folder / "history.json").write_text(json.dumps(rows))
    (folder / "done").touch()


def test_the_papers_experiments_side_by_side(tmp_path, capsys):
    from paper_report import main, time_to

    folder = tmp_path / "mnist_sgd"
    for seed in (0, 1, 2):
        kept_run(folder, "baseline", seed, [4.0, 2.0, 1.0 + seed / 100], 1.0)
        kept_run(folder, "null_space", seed, [4.0, 1.0 + seed / 100, 0.5 + seed / 100], 2.0)
    (folder / "experiment.yaml").write_text("paper_learning_rate: 0.1")
    text = main([str(folder), "--output", str(tmp_path / "all")])
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells[:4] == ["mnist_sgd", "0.1 (both)", "1.01", "0.51"]
    assert cells[4:] == ["**-0.5**", "**-1**", "x 2.00", "x 1.00"]
    assert set(pd.read_csv(tmp_path / "all.csv")["experiment"]) == {"mnist_sgd"}
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    for seed in (0, 1):
        kept_run(tmp_path / "smnist_sgd", "baseline", seed, [1.0, 2.0 + seed], 1.0)
        kept_run(tmp_path / "smnist_sgd", "null_space", seed, [1.0, float("nan")], 1.0)
    text = main([str(tmp_path / "smnist_sgd"), "--output", str(tmp_path / "worse")])
    assert "| diverged | diverged |" in text
    assert "no lower than it starts" in text
    run = pd.DataFrame({"step": [0, 1, 2], "cpu_seconds": [0.0, 10.0, 20.0], "train_loss": [4.0, 2.0, 3.0]})
    assert time_to(run, 3.0) == 5.0
    assert time_to(run, 1.0) == np.inf


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data").exists(), reason="needs the data sets in ../shared/data")
def test_the_papers_figures_of_eigenvectors_and_thresholds(tmp_path):
    from paper_figures import main

    (tmp_path / "mnist").mkdir()
    for path in (ROOT.parent / "shared" / "data" / "mnist").glob("*.parquet"):
        parquet.write_table(parquet.read_table(path).slice(0, 2000), tmp_path / "mnist" / path.name)
    settings = {"base": str(ROOT / "configs" / "paper" / "cpu" / "mnist_sgd.yaml"), "folder": str(tmp_path / "mnist")}
    file = str(tmp_path / "mnist_sgd.yaml")
    Path(file).write_text(yaml.safe_dump(settings))
    shares = main(["variance", file, "--output", str(tmp_path / "variance.png")])
    assert set(shares["role"]) == {"linear", "head"}
    by_layer = shares.groupby("layer")["share"]
    assert by_layer.apply(lambda share: share.is_monotonic_increasing).all()
    assert by_layer.last().to_numpy() == pytest.approx(1.0)
    turns = main(["thresholds", file, "--steps", "4", "--output", str(tmp_path / "thresholds.png")])
    assert list(turns["tau"].unique()) == [1.0, 0.999, 0.99, 0.9]
    last = turns.groupby("tau").last()
    drift = (last["loss"] - turns.groupby("tau")["loss"].first()).abs()
    assert drift[1.0] < 1e-5 < drift[0.9]
    assert last["null_share"].is_monotonic_decreasing
    assert (last["grad_norm"] > turns["grad_norm"].iloc[0]).all()
    for name in ("variance", "thresholds"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.csv").exists()
