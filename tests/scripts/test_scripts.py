"""The scripts, run as a user runs them, on small portions of real data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from pyarrow import parquet

import forks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


def run(script, *words, start=forks.run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
    done = start(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_image_classification_from_yaml_with_an_override(tmp_path):
    out = run(
        "run_image_classification.py",
        *("configs/digits_mlp.yaml", "--num_train_epochs", 1, "--output_dir", tmp_path / "run"),
        *("--history", tmp_path / "history.json", "--teleport_num_batches", 1),
        start=subprocess.run,
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
    from run_image_classification import ImageArguments, parse
    from run_task import TaskArguments

    settings = yaml.safe_load(file.read_text())
    arguments, training = parse([str(file)], TaskArguments if "task" in settings else ImageArguments)
    assert arguments.dataset == settings["dataset"]
    assert training.teleport_config()


def run_grid(monkeypatch, *words):
    """grid.py, in this process; it starts the runs."""
    import grid

    monkeypatch.setattr(sys, "argv", ["grid.py", *map(str, words)])
    monkeypatch.setattr(grid.subprocess, "run", forks.run)
    grid.main()


def test_grid_collects_goes_on_and_is_reported(tmp_path, monkeypatch):
    table = tmp_path / "grid.csv"
    words = [ROOT / "configs/digits_cnn.yaml", "--output", table]
    words += ["--grid", "num_train_epochs=1", "learning_rate=0.1", "teleport_epochs=0,1"]
    run_grid(monkeypatch, *words, "seed=0")
    run_grid(monkeypatch, *words, "seed=0,1")
    rows = list(csv.DictReader(table.open()))
    assert [(row["seed"], row["teleport_epochs"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert float(rows[1]["teleport_seconds"]) > 0
    text = run("grid_report.py", table, "--plot", tmp_path / "plot.png")
    assert "| baseline | 0.1 |" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000


SMALL = {
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "length": 8,
    "vocabulary_size": 40,
    "train_loss_rows": 6,
    "test_loss_rows": 5,
    "patch_size": 2,
    "horizon": 2,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "teleport_epochs": 0,
}


def words(**settings):
    return [str(word) for name, value in {**SMALL, **settings}.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A folder for each kind of data, of a few rows."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        sentences = [" ".join(draw.choice([f"w{i}" for i in range(30)], size=6)) for _ in range(40)]
        rows = Dataset.from_dict({"sentence": sentences, "label": [i % 2 for i in range(40)]})
        rows.to_parquet(root / "text" / f"{split}.parquet")
        pictures = [Picture.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
        features = Features({"picture": Image(), "label": ClassLabel(names=["a", "b", "c"])})
        rows = Dataset.from_dict({"picture": pictures, "label": [i % 3 for i in range(12)]}, features=features)
        rows.to_parquet(root / "image" / f"{split}.parquet")
    Dataset.from_dict({"a": draw.normal(size=120), "b": draw.normal(size=120)}).to_parquet(root / "series" / "data.parquet")
    return root


def trainer_of(tmp_path, **settings):
    from run_image_classification import History, parse
    from run_task import TaskArguments, make_trainer

    trainer = make_trainer(*parse(words(output_dir=tmp_path, **settings), TaskArguments))
    history = History()
    trainer.add_callback(history)
    return trainer, history


@pytest.mark.parametrize(
    ("task", "data", "settings"),
    [
        ("lm", "text", {"kv_heads": 1}),
        ("lm", "text", {"architecture": "qwen3", "tie_embeddings": True}),
        ("lm", "text", {"architecture": "gemma"}),
        ("lm", "text", {"architecture": "gpt2"}),
        ("mlm", "text", {}),
        ("text_classification", "text", {}),
        ("image", "image", {}),
        ("series", "series", {}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_every_task_trains_and_keeps_a_log(task, data, settings, small_data, tmp_path):
    trainer, history = trainer_of(tmp_path, task=task, dataset=small_data / data, **settings)
    trainer.train()
    losses = [row["loss"] for row in history.rows if "loss" in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    for name in ("train", "test"):
        scored = [row for row in history.rows if f"eval_{name}_loss" in row]
        assert [row["step"] for row in scored] == [2, 4]
        assert (f"eval_{name}_accuracy" in scored[0]) == (task in ("text_classification", "image"))
    assert [len(rows) for rows in trainer.eval_dataset.values()] == [6, 5]
    assert trainer.model.config.model_type == {"mlm": "bert", "text_classification": "bert", "image": "vit"}.get(
        task, "teleport-series" if task == "series" else settings.get("architecture", "llama")
    )
    if task == "lm":
        tied = trainer.model.get_input_embeddings().weight is trainer.model.get_output_embeddings().weight
        assert tied == settings.get("tie_embeddings", False)
        assert trainer.train_dataset[0]["input_ids"].max() < trainer.model.config.vocab_size <= 40


def batches(trainer):
    """What the model was given in training."""
    seen = []

    def note(module, positional, inputs):
        if module.training:
            seen.append(inputs["input_ids"].clone())

    handle = trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("task", ["lm", "mlm"])
def test_weights_and_batches_depend_on_the_seed_alone(task, small_data, tmp_path):
    def run(**settings):
        trainer, _ = trainer_of(tmp_path, task=task, dataset=small_data / "text", **settings)
        weights = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        return weights, batches(trainer)

    weights, seen = run()
    same_weights, same_seen = run(learning_rate=0.1, eval_steps=1, soap=True, dropout=0.1, weight_decay=0.1)
    assert torch.equal(weights, same_weights)
    assert torch.equal(seen, same_seen)
    _, wider_seen = run(hidden_size=32)
    assert torch.equal(seen, wider_seen)
    other_weights, other_seen = run(seed=1)
    assert not torch.equal(weights, other_weights)
    assert not torch.equal(seen, other_seen)


def test_masked_rows_of_evaluation_are_the_same_for_every_seed(small_data, tmp_path):
    slices = []
    for seed in (0, 1):
        trainer, _ = trainer_of(tmp_path, task="mlm", dataset=small_data / "text", seed=seed)
        slices.append(trainer.eval_dataset["test"].columns)
        before = trainer.evaluate(), trainer.evaluate()
        assert before[0]["eval_test_loss"] == before[1]["eval_test_loss"]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(slices[0][name], slices[1][name])
    assert (slices[0]["labels"] != -100).any()


def test_soap_takes_the_settings_of_the_command_line(small_data, tmp_path):
    trainer, _ = trainer_of(
        tmp_path, task="lm", dataset=small_data / "text", soap=True, soap_precondition_frequency=3, weight_decay=0.01
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "SOAP"
    assert [group["precondition_frequency"] for group in optimizer.param_groups] == [3, 3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_evaluation_does_not_count_as_training_time(small_data, tmp_path):
    import time

    from transformers import TrainerCallback

    trainer, history = trainer_of(tmp_path, task="series", dataset=small_data / "series", eval_on_start=True)

    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.5)

        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.05)

    trainer.add_callback(Slow())
    trainer.train()
    ends = {row["step"]: row for row in history.rows if "eval_test_loss" in row}
    assert sorted(ends) == [0, 2, 4]
    assert ends[0]["seconds"] == 0
    # Four evaluations of half a second and more are left out, four steps with their naps are in.
    assert 0.2 <= ends[4]["seconds"] < 2
    assert 0 < ends[2]["seconds"] < ends[4]["seconds"]


def test_fine_tuning_starts_from_a_model_trained_here(small_data, tmp_path):
    folder, history = tmp_path / "mlm", tmp_path / "history.json"
    run("run_task.py", *words(task="mlm", dataset=small_data / "text", output_dir=folder, max_steps=3, history=history))
    # Three steps, evaluated after the second: the end is evaluated too.
    assert [row["step"] for row in json.loads(history.read_text()) if "eval_test_loss" in row] == [2, 3]
    trainer, _ = trainer_of(
        tmp_path / "fine", task="text_classification", dataset=small_data / "text", pretrained=folder, vocabulary_size=20
    )
    # The saved tokenizer counts, not the vocabulary size of this run.
    assert trainer.model.config.vocab_size == len(trainer.processing_class) > 20
    from transformers import AutoModelForMaskedLM

    pretrained = AutoModelForMaskedLM.from_pretrained(folder)
    own, theirs = trainer.model.bert.encoder.state_dict(), pretrained.bert.encoder.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    scratch, _ = trainer_of(tmp_path, task="text_classification", dataset=small_data / "text", pretrained="", vocabulary_size=20)
    assert scratch.model.config.vocab_size == 20
    with pytest.raises(FileNotFoundError, match="is no folder: run the mlm task first"):
        trainer_of(tmp_path, task="text_classification", dataset=small_data / "text", pretrained=tmp_path / "nowhere")


def test_arms_share_a_table_and_are_reported(small_data, tmp_path, monkeypatch):
    config, table = tmp_path / "series.yaml", tmp_path / "study.csv"
    config.write_text(yaml.safe_dump({**SMALL, "task": "series", "dataset": str(small_data / "series")}))
    common = [config, "--script", "run_task.py", "--output", table]
    run_grid(monkeypatch, *common, "--arm", "baseline", "--grid", "learning_rate=0.01", "seed=0,1", "--jobs", 2)
    soap = [*common, "--arm", "soap", "--set", "soap=true", "--grid", "learning_rate=0.01"]
    run_grid(monkeypatch, *soap, "seed=0")
    run("grid.py", *soap, "seed=0,1", start=subprocess.run)
    rows = pd.read_csv(table, keep_default_na=False)
    assert list(rows.columns[:4]) == ["arm", "learning_rate", "seed", "soap"]
    found = sorted(zip(rows["arm"], rows["seed"], rows["step"], rows["soap"].astype(str), strict=True))
    expected = [("baseline", seed, step, "") for seed in (0, 1) for step in (2, 4)]
    expected += [("soap", seed, step, "true") for seed in (0, 1) for step in (2, 4)]
    assert found == expected
    assert set(rows["test_accuracy"]) == {""}
    text = run("study_report.py", table, "--plot", tmp_path / "plot.png")
    assert "| baseline | 0.01 | 2 |" in text
    assert "| soap | 0.01 | 2 |" in text
    assert "test accuracy" not in text
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_empty_value_and_words_are_handed_on(monkeypatch, tmp_path):
    import grid

    class Failed:
        returncode, stderr = 1, "as the test wants it"

    commands = []
    monkeypatch.setattr(grid.subprocess, "run", lambda command, **kwargs: commands.append(command) or Failed())
    with pytest.raises(RuntimeError, match="as the test wants it"):
        grid.run("run_task.py", "x.yaml", {"teleport_steps": "", "teleport_target_modules": "a b", "seed": "3"}, 1)
    assert commands[0][3:10] == ["--teleport_steps", "", "--teleport_target_modules", "a", "b", "--seed", "3"]
    with pytest.raises(ValueError, match=r"--grid = \['seed'\] is not allowed; allowed: NAME=VALUE"):
        grid.assignments(["seed"], "--grid")


def study(tmp_path, *arms):
    """A CSV file: an arm is its name and what to add to the loss of the baseline at each of 3 evaluations, by learning rate."""
    rows = []
    for arm, by_rate in arms:
        for rate, losses in by_rate.items():
            for seed in (0, 1):
                for step, loss in zip((100, 200, 300), losses, strict=True):
                    timing = {"seconds": step, "cpu_seconds": 2 * step, "teleport_seconds": 0}
                    value = {"train_loss": loss + seed, "test_loss": loss + seed + 1, "test_accuracy": 0.5}
                    rows.append({"arm": arm, "learning_rate": rate, "seed": seed, "epoch": 1, "step": step} | timing | value)
    file = tmp_path / "study.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def cells(table, arm):
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return next(dict(zip(header, line, strict=True)) for line in lines if line[0] == arm)


def test_arms_are_compared_at_their_best_and_by_seed(tmp_path):
    from study_report import read, study_table

    nan = float("nan")
    file = study(
        tmp_path,
        ("faster", {0.1: (4.0, 2.0, 1.0), 1.0: (9.0, 9.0, 9.0)}),
        ("base", {0.1: (9.0, 9.0, 4.0), 1.0: (5.0, 4.0, 3.0)}),
        ("worse", {0.1: (9.0, 8.0, 7.0), 1.0: (1.0, nan, nan)}),
    )
    runs = read([file], "base")
    assert next(iter(runs)) == "base"
    table = study_table(runs, "base")
    base, faster, worse = (cells(table, arm) for arm in ("base", "faster", "worse"))
    assert (base["best learning rate"], faster["best learning rate"], worse["best learning rate"]) == ("1", "0.1", "0.1")
    # The seeds differ by 1 in the loss, which pairing takes out.
    assert base["training loss"].startswith("3.5000 ± 6.3531")
    assert faster["minus the baseline's"] == "-2.0000 ± 0.0000"
    # From 4 at step 100 to 2 at step 200: the baseline's 3 is passed at 150 of its 300 steps.
    assert faster["steps to the baseline"] == faster["CPU seconds to the baseline"] == "0.500 ± 0.000"
    assert base["steps to the baseline"] == "1.000 ± 0.000"
    assert worse["steps to the baseline"] == "-"
    assert faster["test accuracy"] == "0.5000 ± 0.0000"


def test_passing_a_loss(tmp_path):
    from study_report import passage

    run = pd.DataFrame({"step": [10, 20, 30], "cpu_seconds": [1.0, 2.0, 4.0], "train_loss": [float("inf"), 3.0, 1.0]})
    assert passage(run, 2.0) == (25.0, 3.0)
    assert passage(run, 3.5) == (20.0, 2.0)
    assert passage(run, 0.5) is None
    assert passage(run[1:], 3.5) == (20.0, 2.0)


def test_the_study_says_what_it_cannot_compare(tmp_path):
    from study_report import read

    file = study(tmp_path, ("a", {0.1: (3.0, 2.0, 1.0)}))
    with pytest.raises(ValueError, match=r"baseline = 'baseline' is not allowed; allowed: one of the arms \['a'\]"):
        read([file], "baseline")
    with pytest.raises(ValueError, match=r"two runs are \{'arm': 'a', 'learning_rate': 0.1, 'seed': 0\}"):
        read([file, file], "a")
    pd.read_csv(file).drop(columns="arm").to_csv(file)
    with pytest.raises(ValueError, match=r"lack the columns \['arm'\]"):
        read([file], "a")


def test_the_symmetries_of_some_architectures(tmp_path):
    out = run("zoo/report.py", "symmetries", "llama", "gpt2", "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page in out
    assert "2 architectures, 0 failed; 2 have a symmetry to turn, 1 a residual stream when gains are uneven" in page
    assert "transformer.wte.weight reads its output and writes its input" in page


def test_the_cost_of_a_step_after_a_turn():
    out = run("step_cost.py", "--hidden_size", 32, "--layers", 1, "--repeats", 2)
    assert "median ratio" in out
    assert "the event:" in out


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
    assert cells[4:] == ["**-0.500 ± 0.000**", "**-1.000 ± 0.000**", "x 2.00", "x 1.00"]
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


def test_comparisons_side_by_side(tmp_path):
    from when_report import main

    from hf_teleport.lab.report import record
    from hf_teleport.lab.verdict import Interval, Verdict

    def judged(arm, word, value, never=0):
        intervals = [Interval(value, 0.1, 3)] * 7
        return Verdict(arm, 0.1, 3, *intervals[:3], never, *intervals[3:], 0, word)

    folder = tmp_path / "mnist"
    folder.mkdir()
    verdicts = [judged("baseline", "reference", 1.0), judged("auto", "no difference that the seeds show", 0.5, never=1)]
    verdicts.append(judged("other", "worse", float("nan")))
    made = SimpleNamespace(clock="seconds", rates=[0.1], seeds=[0, 1, 2], arms=["baseline", "auto", "other"])
    found = SimpleNamespace(protocol=made, best={"baseline": 0.1}, remarks=[], verdicts=verdicts)
    (folder / "comparison.json").write_text(json.dumps(record(found)))
    (folder / "comparison.csv").write_text("arm,learning_rate\nbaseline,0.1\n")
    text = main([str(folder), str(tmp_path / "none"), "--output", str(tmp_path / "all.csv")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert rows[0] == ["mnist", "baseline", "0.1", "1.00 ± 0.10", "", "", "", "", ""]
    assert rows[1] == [
        "",
        "auto",
        "0.1",
        *["0.50 ± 0.10"] * 2,
        "0.50 ± 0.10; never 1 of 3",
        *["0.50 ± 0.10"] * 2,
        "no difference",
    ]
    assert rows[2][3:] == ["-", "-", "-", "-", "-", "worse"]
    assert list(pd.read_csv(tmp_path / "all.csv")["task"]) == ["mnist"]
    with pytest.raises(SystemExit, match="hf-teleport compare first"):
        main([str(tmp_path)])


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
