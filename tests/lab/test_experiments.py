"""Experiments on real rows: what is run, kept, gone on with, compared and drawn."""

import contextlib
import io
import json
import os
import signal
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import TrainerCallback

from hf_teleport.cli import main
from hf_teleport.lab.arguments import ExperimentArguments
from hf_teleport.lab.data.pipelines import OPTIONS
from hf_teleport.lab.history import History
from hf_teleport.lab.plot import FIGURE, NUMBERS
from hf_teleport.lab.results import best_rates, choices, curves, evaluations
from hf_teleport.lab.runs import execute, make_trainer
from hf_teleport.lab.settings import plan, read
from hf_teleport.lab.workload import Workload, evenly
from hf_teleport.reporting import extras

import forks
import ranks
from tiny_experiments import history, interrupted_at, needs_data, run

# --- settings -------------------------------------------------------------------------------------------------------------


def test_files_inherit_and_words_win(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "common.yaml").write_text("seeds: [0, 1]\nmodel: mlp\narms: {a: {teleport_epochs: 0}, b: {teleport_seed: 1}}")
    (tmp_path / "other.yaml").write_text("model: cnn\nsizes: {hidden_act: relu, hidden_sizes: [3]}")
    (tmp_path / "folder" / "x.yaml").write_text(
        "base: [../common.yaml, ../other.yaml]\nsizes: {hidden_sizes: [4]}\narms: {a: {teleport_num_batches: 3}, b: null}"
    )
    words = ["--learning_rates", "0.1", "1e-2", "--save_strategy", "no", "--arms.a.teleport_epochs=0,2", "--seeds", "7"]
    assert read(tmp_path / "folder" / "x.yaml", words) == {
        "output_dir": "runs/folder/x",
        "seeds": 7,
        "model": "cnn",
        "sizes": {"hidden_act": "relu", "hidden_sizes": [4]},
        "arms": {"a": {"teleport_epochs": "0,2", "teleport_num_batches": 3}, "b": None},
        "learning_rates": [0.1, "1e-2"],
        "save_strategy": "no",
    }


def test_a_file_that_inherits_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml is its own base"):
        read(tmp_path / "a.yaml")


@needs_data
def test_every_run_has_its_arguments(config):
    file = config(
        learning_rates=[0.3, "1e-1"], seeds=[0, 4], arms={"off": {"teleport_epochs": 0}, "on": {"optim": "adamw_torch"}}
    )
    runs = plan(read(file, ["--max_grad_norm", "0.5"])).runs
    assert len({run.folder for run in runs}) == 8
    # All arms with one seed come before the next seed.
    assert [(run.seed, run.arm, run.learning_rate) for run in runs[:5]] == [
        (0, "off", 0.3),
        (0, "off", 0.1),
        (0, "on", 0.3),
        (0, "on", 0.1),
        (4, "off", 0.3),
    ]
    for one in runs:
        training = one.training
        assert (training.seed, training.data_seed, training.teleport_seed) == (one.seed,) * 3
        assert (training.learning_rate, training.max_grad_norm) == (one.learning_rate, 0.5)
        assert training.optim == ("sgd" if one.arm == "off" else "adamw_torch")
        assert bool(training.teleport_config().epochs) == (one.arm == "on")
        assert one.folder.parts[-3:] == (one.arm, f"lr{one.learning_rate}", f"seed{one.seed}")


@needs_data
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_row", "3"], r"unknown key 'train_row' in the settings; the nearest is 'train_rows'"),
        (["--teleport_epoch", "3"], r"unknown key 'teleport_epoch' in the settings; the nearest is 'teleport_epochs'"),
        (["--arms.fast.teleport_step", "3"], r"unknown key 'teleport_step' in arm 'fast'; the nearest is 'teleport_steps'"),
        (["--arms.fast.train_rows", "3"], r"unknown key 'train_rows' in arm 'fast'"),
        (
            ["--arms.fast.teleport_method", "nul_space"],
            r"arm 'fast': teleport_method = 'nul_space' is not allowed; allowed: one of",
        ),
        (["--arms.fast.teleport_learning_rate", "-1"], r"arm 'fast': teleport_learning_rate = -1.0 is not allowed"),
        (["--arms.fast.num_train_epochs", "many"], r"arm 'fast': .*num_train_epochs.*many"),
        (["--arms.fast.optim", "sdg"], r"arm 'fast': .*sdg"),
        (["--arms.fast.seed", "3"], r"key 'seed' in arm 'fast' is not allowed, .* give 'seeds', a list"),
        (["--learning_rate", "3"], r"key 'learning_rate' in the settings is not allowed, .* give 'learning_rates'"),
        (["--arms.a/b.optim", "sgd"], r"arm 'a/b' = .* is not allowed"),
        (["--sizes.hidden_size", "[3]"], r"unknown key 'hidden_size' in sizes of model 'mlp'; the nearest is 'hidden_sizes'"),
        (["--sizes.hidden_act", "relux"], r"hidden_act = 'relux' is not allowed"),
        (["--length", "8"], r"unknown key 'length' in data of kind 'image'"),
        (["--model", "cnm"], r"model = 'cnm' is not allowed; allowed: one of \['mlp', 'cnn'"),
        (
            ["--model", "transformer_lm"],
            r"takes data of kind 'text', but .* 'mnist' is of kind 'image'; allowed: \['mlp', 'cnn'",
        ),
        (["--dataset", "some/where"], r"of kind None; allowed: a kind, one of \['image'"),
        (["--train_rows", "0"], r"train_rows = 0 is not allowed"),
        (["--seeds", "1", "1"], r"seeds = \[1, 1\] is not allowed; allowed: whole numbers from 0, each once"),
        (["--seeds", "0.5"], r"seeds = 0.5 is not allowed; allowed: whole numbers from 0"),
        (["--seeds", "true"], r"seeds = True is not allowed; allowed: whole numbers from 0"),
        (["--learning_rates", "0"], r"learning_rates = 0 is not allowed; allowed: positive numbers"),
        (["--paper_learning_rate", "0.3"], r"paper_learning_rate = 0.3 is not allowed; allowed: one of learning_rates = \[0.1\]"),
        (["--arms", "null"], r"'arms' is missing from the settings"),
        (["--arms.baseline", "null", "--arms.null_space", "null"], r"arms = \{\} is not allowed"),
        (["--seeds"], r"--seeds has no value"),
        (["seeds", "3"], r"'seeds' is not allowed where a key is expected"),
    ],
)
def test_wrong_settings_are_named_before_any_work(config, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(read(config(), words))
    assert not (tmp_path / "out").exists()


def test_one_name_is_one_key_of_a_file():
    training = set(ExperimentArguments.__dataclass_fields__)
    assert not training & {*Workload.__dataclass_fields__, *(name for names in OPTIONS.values() for name in names)}


def test_rows_are_spread_evenly():
    assert [evenly(range(10), 4)[i] for i in range(4)] == [0, 2, 5, 7]
    assert list(evenly(range(3), 4)) == list(evenly(range(3), None)) == [0, 1, 2]


# --- runs -----------------------------------------------------------------------------------------------------------------


@needs_data
def test_methods_side_by_side(config):
    """From the same weights on the same rows: until the teleport all arms are one."""
    methods = ["null_space", "symmetry", "level_set"]
    arms = {"baseline": {"teleport_epochs": 0}, **{name: {"teleport_method": name} for name in methods}}
    experiment, count = run(config(arms=arms))
    assert count == 4
    logs = {run.arm: history(run) for run in experiment.runs}
    losses = {arm: [row["loss"] for row in rows if "loss" in row] for arm, rows in logs.items()}
    for name in methods:
        (event,) = [row for row in logs[name] if "teleport/steps" in row]
        assert (event["step"], event["teleport/method"]) == (2, name)
        assert event["teleport/steps"] > 0
        assert event["teleport/grad_norm_after"] > event["teleport/grad_norm_before"]
        assert losses[name][:2] == losses["baseline"][:2]
        assert losses[name][3:] != losses["baseline"][3:]
    assert not any("teleport/steps" in row for row in logs["baseline"])
    for run_ in experiment.runs:
        events = [] if run_.arm == "baseline" else ["teleports.json"]
        assert sorted(path.name for path in run_.folder.iterdir()) == ["done", "history.json", "settings.json", *events]
        rows = json.loads((run_.folder / "history.json").read_text())
        assert [row["step"] for row in rows if "eval_test_loss" in row] == [3, 6]
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds)
        # Nothing of an evaluation is in them.
        assert len({row["seconds"] for row in rows if row["step"] == 3}) == 1
        assert seconds[-1] < next(row["train_runtime"] for row in rows if "train_runtime" in row)


@needs_data
def test_seeds_differ_and_repeat(config, tmp_path):
    experiment, _ = run(config(arms={"on": {}}, seeds=[0, 1]))
    again, _ = run(config(arms={"on": {}}, seeds=[1], output_dir=str(tmp_path / "again")))
    first, second = map(history, experiment.runs)
    assert history(again.runs[0]) == second
    assert [row["loss"] for row in first if "loss" in row] != [row["loss"] for row in second if "loss" in row]


@needs_data
def test_the_last_step_is_always_evaluated(config):
    experiment, _ = run(config(arms={"off": {"teleport_epochs": 0}}, eval_steps=4))
    assert [row["step"] for row in history(experiment.runs[0]) if "eval_test_loss" in row] == [4, 6]


@needs_data
def test_what_is_finished_is_skipped(config, monkeypatch):
    file = config()
    experiment, count = run(file)
    assert count == 2
    before = [(run.folder / "history.json").stat().st_mtime_ns for run in experiment.runs]
    with monkeypatch.context() as patch:
        patch.setattr(Workload, "load", lambda self: pytest.fail("there is nothing to do"))
        assert run(file)[1] == 0
    # More runs, and ways of keeping them that change no outcome.
    more, count = run(file, "--seeds", "0", "1", "--save_strategy", "epoch", "--arms.null_space", "null")
    assert count == 1
    assert [(run.folder / "history.json").stat().st_mtime_ns for run in experiment.runs] == before
    assert yaml.safe_load((more.output / "experiment.yaml").read_text())["seeds"] == [0, 1]
    assert not list(more.output.rglob("checkpoint-*"))


@needs_data
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arms.null_space.teleport_num_batches", "1"],
            r"teleport_num_batches = 1 is not allowed; allowed: 2, because .*null_space",
        ),
        (["--train_rows", "80"], r"train_rows = 80 is not allowed; allowed: 96"),
        (["--sizes.hidden_sizes", "[8, 8]"], r"sizes = .*\[8, 8\].* is not allowed; allowed: .*\[24, 24\]"),
        (["--weight_decay", "0.1"], r"weight_decay = 0.1 is not allowed; allowed: not given"),
    ],
)
def test_other_settings_in_the_folder_are_an_error(config, words, message, monkeypatch):
    file = config()
    experiment = plan(read(file))
    # What an interrupted run leaves is enough.
    for run_ in experiment.runs:
        run_.folder.mkdir(parents=True)
        (run_.folder / "settings.json").write_text(json.dumps(run_.settings))
    with pytest.raises(ValueError, match=message):
        execute(plan(read(file, words)))


@needs_data
@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_interrupted_it_goes_on_where_it_was(config, tmp_path, monkeypatch, save_strategy):
    """With the teleport before step 2 behind it, once again at the checkpoint, and as a whole run in the end."""
    settings = {"learning_rates": [0.1, 0.2], "save_strategy": save_strategy, "save_steps": 3, "save_total_limit": 1}
    whole, _ = run(config(**settings, output_dir=str(tmp_path / "whole")))
    file, steps = config(**settings), []
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(file)
    first = plan(read(file)).runs[0]
    assert (first.folder / "checkpoint-3").exists() == (save_strategy == "steps")
    # A checkpoint that was cut short is none.
    (first.folder / "checkpoint-4").mkdir()
    (first.folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    with monkeypatch.context() as patch:
        interrupted_at(None, patch, steps)
        experiment, count = run(file)
    assert count == 4
    start = 3 if save_strategy == "steps" else 0
    assert [step for folder, step in steps if folder == str(first.folder)] == list(range(start, 6))
    for one, other in zip(experiment.runs, whole.runs, strict=True):
        assert history(one) == history(other)
    assert not list(experiment.output.rglob("checkpoint-*"))
    seconds = [row["seconds"] for row in json.loads((first.folder / "history.json").read_text())]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


@needs_data
def test_killed_at_the_command_line_it_goes_on(config, tmp_path):
    file = config(num_train_epochs=20, save_strategy="steps", save_steps=10, eval_steps=60, arms={"on": {}})
    words = ["experiment", str(file), "--output_dir", str(tmp_path / "killed")]
    forks.start()
    process = forks.context.Process(target=main, args=(words,))
    process.start()
    folder = tmp_path / "killed" / "on" / "lr0.1" / "seed0"
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "done").exists()
    assert main(words) == 0
    (whole,) = run(file)[0].runs
    (resumed,) = plan(read(file, ["--output_dir", str(tmp_path / "killed")])).runs
    assert history(resumed) == history(whole)


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "adam_beta2": 0.95, "embedding_learning_rate": 0.02},
    "soap": {"optimizer": "SOAP", "optimizer_settings": {"precondition_frequency": 2}, "embedding_learning_rate": 0.02},
    "muon": {"optimizer": "muon+adamw", "embedding_learning_rate": 0.02, "parameter_learning_rates": {"norm": 0.005}},
}


@needs_data
def test_optimizers_side_by_side_and_gone_on_with(short, tmp_path, monkeypatch):
    """A tiny Llama on Penn Treebank: from the same weights on the same rows; each interrupted and gone on with."""
    arms = {name: {"teleport_epochs": 0, **settings} for name, settings in OPTIMIZERS.items()}
    settings = {"arms": arms, "learning_rates": [0.01], "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    settings |= {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}
    whole, _ = run(short("llama", **settings, output_dir=str(tmp_path / "whole")))
    logs = {one.arm: history(one) for one in whole.runs}
    losses = {arm: [row["loss"] for row in rows if "loss" in row] for arm, rows in logs.items()}
    assert len({rows[0] for rows in losses.values()}) == 1
    assert len({rows[-1] for rows in losses.values()}) == 3
    assert all(rows[-1] < rows[0] for rows in losses.values())
    # Trainer logs the learning rate, not that of the embeddings; a warm-up and a decay go over all groups alike.
    rates = [[row["learning_rate"] for row in rows if "loss" in row] for rows in logs.values()]
    assert all(each == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]) for each in rates)
    for one in whole.runs:
        file = short("llama", **{**settings, "arms": {one.arm: arms[one.arm]}})
        with monkeypatch.context() as patch:
            interrupted_at(3, patch)
            with pytest.raises(KeyboardInterrupt):
                run(file)
        (resumed,) = plan(read(file)).runs
        assert (resumed.folder / "checkpoint-2").exists()
        run(file)
        assert history(resumed) == history(one)


@needs_data
def test_evaluation_does_not_count_as_training_time(short, monkeypatch):
    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.5)

        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.05)

    experiment = plan(read(short("forecaster", arms={"off": {"teleport_epochs": 0}}, max_steps=4, eval_on_start=True)))
    trainer = make_trainer(experiment.runs[0], experiment.workload, experiment.workload.data, {})
    log = History()
    for callback in (log, Slow()):
        trainer.add_callback(callback)
    trainer.train()
    ends = {row["step"]: row for row in log.rows if "eval_test_loss" in row}
    assert sorted(ends) == [0, 2, 4]
    assert ends[0]["seconds"] == 0
    # Four evaluations of half a second and more are left out, four steps with their naps are in.
    assert 0.2 <= ends[4]["seconds"] < 2
    assert 0 < ends[2]["seconds"] < ends[4]["seconds"]


def in_processes(rank, size):
    """What one of several processes carries out, what is left then, and what it shows."""
    words = ["--disable_tqdm", "false", "--per_device_train_batch_size", "8"]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        counts = [run(os.environ["EXPERIMENT"], *words)[1] for _ in range(2)]
    return counts, shown.getvalue()


@needs_data
def test_processes_train_each_run_together(config, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERIMENT", str(config()))
    (first, shown), (second, hidden) = ranks.run(in_processes, 2, tmp_path)
    assert first == second == [2, 0]
    assert "null_space, learning rate 0.1, seed 0" in shown
    assert not hidden
    kept = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("settings.json")]
    assert [settings["processes"] for settings in kept] == [2, 2]
    with pytest.raises(ValueError, match="processes = 1 is not allowed; allowed: 2"):
        run(config(), "--per_device_train_batch_size", "8")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["experiment", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "there is no finished run" in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_way_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "pip install 'hf_teleport[experiments]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="needs not_there, which"):
        extras.require_extra("not_there")


# --- what came of them ----------------------------------------------------------------------------------------------------


def keep(output, arm, rate, seed, losses):
    """A finished run as `execute` leaves it, with evaluations at steps 0, 10 and so on."""
    folder = output / arm / f"lr{rate}" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"arm": arm, "learning_rate": rate, "seed": seed}))
    rows = []
    for i, loss in enumerate(losses):
        row = {"step": 10 * i, "seconds": i * (1.0 + seed), "cpu_seconds": i * (0.5 + seed)}
        rows += [row | {"loss": 9.0}, row | {"eval_train_loss": loss, "eval_train_accuracy": 0.0}]
        rows += [row | {"eval_test_loss": loss + 1, "eval_test_accuracy": 1 / (1 + loss)}]
    (folder / "history.json").write_text(json.dumps(rows))
    (folder / "done").touch()
    return folder


@pytest.fixture
def kept(tmp_path):
    keep(tmp_path, "baseline", 0.1, 0, [4.0, 1.0])
    keep(tmp_path, "baseline", 0.1, 1, [4.0, 3.0])
    keep(tmp_path, "baseline", 0.5, 0, [4.0, float("nan")])
    keep(tmp_path, "baseline", 0.5, 1, [4.0, 0.0])
    keep(tmp_path, "null_space", 0.1, 0, [4.0, 2.0])
    keep(tmp_path, "null_space", 0.5, 0, [4.0, 1.5])
    (keep(tmp_path, "null_space", 0.5, 1, [4.0, 0.0]) / "done").unlink()
    (tmp_path / "experiment.yaml").write_text("paper_learning_rate: 0.1")
    return tmp_path


def test_numbers_by_hand(kept):
    frame = evaluations(kept)
    table = curves(frame).set_index(["arm", "learning_rate", "step"])
    row = table.loc[("baseline", 0.1, 10)]
    assert (row["train_loss"], row["test_loss"], row["seconds"], row["cpu_seconds"], row["seeds"]) == (2.0, 3.0, 1.5, 1.0, 2)
    assert row["train_loss_sd"] == pytest.approx(2**0.5)
    assert (row["measure"], row["metric"]) == ("accuracy", (1 / 2 + 1 / 4) / 2)
    # Trainer's batches of 8.
    assert row["samples"] == 80
    # A run that diverged counts, and one that is not finished does not.
    assert np.isinf(table.loc[("baseline", 0.5, 10), "train_loss"])
    assert table.loc[("null_space", 0.5, 10), "seeds"] == 1
    assert np.isnan(table.loc[("null_space", 0.5, 10), "train_loss_sd"])
    assert best_rates(frame) == {"baseline": 0.1, "null_space": 0.5}
    assert choices(frame, 0.1) == {
        "paper-like learning rate": {"baseline": 0.1, "null_space": 0.1},
        "best learning rate": {"baseline": 0.1, "null_space": 0.5},
    }
    assert list(choices(frame, None)) == ["best learning rate"]


def test_samples_of_teleports_are_counted(tmp_path):
    """Two processes of 4 x 3 rows a step; events before the steps 0 and 10, the second with two methods."""
    folder = keep(tmp_path, "null_space", 0.1, 0, [4.0, 2.0, 1.0])
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "teleport_num_batches": 5}
    rows = json.loads((folder / "history.json").read_text())
    rows += [{"step": step, "teleport/steps": 1} for step in (0, 10, 10)]

    def samples(**more):
        (folder / "settings.json").write_text(json.dumps(settings | more))
        (folder / "history.json").write_text(json.dumps(rows))
        return list(evaluations(tmp_path)["samples"])

    # An evaluation comes before the event of the same step.
    assert samples(teleport_batch_size=7) == [0, 240 + 42, 480 + 84]
    assert samples() == [0, 240 + 48, 480 + 96]
    # There are no more rows than that to draw.
    assert samples(teleport_batch_size=7, train_rows=30) == [0, 240 + 30, 480 + 60]


def test_a_rate_that_was_only_looked_at_is_not_the_best(kept):
    keep(kept, "baseline", 0.9, 0, [4.0, 0.1])
    assert best_rates(evaluations(kept))["baseline"] == 0.1


def test_plot_writes_picture_and_numbers_and_prints_a_table(kept, capsys):
    assert main(["plot", str(kept)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [
        "baseline",
        "0.1",
        "(paper-like)",
        "2",
        "±",
        "1.4",
        "3",
        "±",
        "1.4",
        "0.375",
        "±",
        "0.18",
        "1.5",
        "±",
        "0.71",
        "2",
    ] in lines
    assert ["null_space", "0.5", "(best)", "1.5", "2.5", "0.4", "1", "1"] in lines
    assert (kept / FIGURE).read_bytes().startswith(b"\x89PNG")
    written = pd.read_csv(kept / NUMBERS)
    assert list(written.columns[:4]) == ["arm", "learning_rate", "step", "seconds"]
    pd.testing.assert_frame_equal(written, curves(evaluations(kept)), check_dtype=False)


def test_figure_has_each_arm_against_steps_and_seconds(kept):
    from hf_teleport.lab.plot import figure

    frame = evaluations(kept)
    panels = figure(curves(frame), choices(frame, 0.1)).axes
    assert [panel.get_xlabel().split(",")[0] for panel in panels] == ["step", "seconds"] * 2
    lines = panels[3].get_lines()
    assert [line.get_label() for line in lines] == ["baseline, 0.1", "null_space, 0.5"]
    np.testing.assert_allclose(lines[0].get_xydata(), [[0.0, 4.0], [1.5, 2.0]])


@needs_data
def test_from_the_command_to_the_plot(config, tmp_path, capsys):
    file = config(learning_rates=[0.1, 0.3], paper_learning_rate=0.1, eval_on_start=True)
    assert main(["experiment", str(file)]) == 0
    assert main(["plot", str(tmp_path / "out")]) == 0
    assert "null_space" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "out" / NUMBERS)
    assert len(written) == 2 * 2 * 3
    at_start = written[written["step"] == 0]
    assert at_start["train_loss"].nunique() == 1
    assert (at_start["seconds"] == 0).all()
    assert torch.isfinite(torch.tensor(written["train_loss"].to_numpy())).all()
