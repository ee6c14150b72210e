"""The scripts, run as a user runs them, on small portions of real data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def run(script, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_image_classification_from_yaml_with_an_override(tmp_path):
    out = run(
        "run_image_classification.py",
        *("configs/digits_mlp.yaml", "--num_train_epochs", 1, "--output_dir", tmp_path / "run"),
        *("--history", tmp_path / "history.json", "--teleport_num_batches", 1),
    )
    assert "eval_test_accuracy" in out
    assert (tmp_path / "run" / "model.safetensors").exists()
    log = json.loads((tmp_path / "history.json").read_text())
    assert [row["step"] for row in log if "teleport/steps" in row] == [0]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_unknown_yaml_key_is_named(tmp_path):
    from run_image_classification import parse

    file = tmp_path / "x.yaml"
    file.write_text("teleport_epoch: 3\n")
    with pytest.raises(ValueError, match="teleport_epoch"):
        parse([str(file)])


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid(file):
    from run_image_classification import parse

    images, training = parse([str(file)])
    assert images.dataset == yaml.safe_load(file.read_text())["dataset"]
    assert training.teleport_config()


def test_grid_collects_goes_on_and_is_reported(tmp_path):
    table = tmp_path / "grid.csv"
    words = [
        "configs/digits_cnn.yaml",
        "--output",
        table,
        "--grid",
        "num_train_epochs=1",
        "learning_rate=0.1",
        "teleport_epochs=0,1",
    ]
    run("grid.py", *words, "seed=0")
    run("grid.py", *words, "seed=0,1")
    rows = list(csv.DictReader(table.open()))
    assert [(row["seed"], row["teleport_epochs"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert float(rows[1]["teleport_seconds"]) > 0
    text = run("grid_report.py", table, "--plot", tmp_path / "plot.png")
    assert "| baseline | 0.1 |" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000
