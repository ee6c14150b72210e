"""Experiments on real rows: what is run, kept, gone on with, compared and drawn."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from hf_teleport import TeleportTrainer
from hf_teleport.cli import main
from hf_teleport.lab.arguments import ExperimentArguments
from hf_teleport.lab.data.pipelines import _PIPELINES
from hf_teleport.lab.plot import FIGURE, NUMBERS
from hf_teleport.lab.results import best_rates, choices, curves, evaluations
from hf_teleport.lab.runs import execute
from hf_teleport.lab.settings import plan, read
from hf_teleport.lab.workload import OPTIONS, Workload, evenly
from hf_teleport.reporting import extras

import forks
import ranks

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"needs the data sets in {SHARED}")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    for path in (SHARED / "mnist").glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 200), folder / path.name)
    return folder


@pytest.fixture
def config(mnist, tmp_path):
    """A function that writes a YAML file and returns its path: 6 steps with a teleport before the third."""

    def write(**settings):
        defaults = {
            "dataset": "mnist",
            "folder": str(mnist),
            "model": "mlp",
            "sizes": {"hidden_sizes": [24, 24], "hidden_act": "leaky_relu"},
            "train_rows": 96,
            "test_rows": 40,
            "output_dir": str(tmp_path / "out"),
            "arms": {"baseline": {"teleport_epochs": 0}, "null_space": {"teleport_method": "null_space"}},
            "learning_rates": [0.1],
            "seeds": [0],
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "teleport_warmup_steps": 2,
            "teleport_num_batches": 2,
            "teleport_batch_size": 8,
            "teleport_steps_per_batch": 2,
        }
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump({**defaults, **settings}, sort_keys=False))
        return file

    return write


def run(file, *words):
    experiment = plan(read(file, words))
    return experiment, execute(experiment)


def history(run):
    """A run's log without what is measured with a clock, and without Trainer's summary."""
    rows = json.loads((run.folder / "history.json").read_text())
    timed = ("seconds", "runtime", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows if "train_runtime" not in row]


def interrupted_at(step, monkeypatch, seen=None):
    """Let training stop in the middle of a step, as by Ctrl-C."""
    real = TeleportTrainer.training_step

    def training_step(self, *args, **kwargs):
        if seen is not None:
            seen.append((self.args.output_dir, self.state.global_step))
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TeleportTrainer, "training_step", training_step)


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
    for run in runs:
        training = run.training
        assert (training.seed, training.data_seed, training.teleport_seed) == (run.seed,) * 3
        assert (training.learning_rate, training.max_grad_norm) == (run.learning_rate, 0.5)
        assert training.optim == ("sgd" if run.arm == "off" else "adamw_torch")
        assert bool(training.teleport_config().epochs) == (run.arm == "on")
        assert run.folder.parts[-3:] == (run.arm, f"lr{run.learning_rate}", f"seed{run.seed}")


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
            r"takes data of kind 'text', but .* 'mnist' are of kind 'image'; allowed: \['mlp', 'cnn'",
        ),
        (["--dataset", "some/where"], r"of kind None; allowed: a kind, one of \['image'"),
        (["--train_rows", "0"], r"train_rows = 0 is not allowed"),
        (["--seeds", "1", "1"], r"seeds = \[1, 1\] is not allowed; allowed: whole numbers from 0, each once"),
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


def test_options_are_those_of_the_pipelines():
    import inspect

    assert {kind: set(names) for kind, names in OPTIONS.items()} == {
        kind: set(list(inspect.signature(make).parameters)[2:]) for kind, make in _PIPELINES.items()
    }
    # One name is one key of a file.
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
            r"teleport_num_batches = 1 is not allowed; allowed: 2, for .*null_space",
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


# --- models of Transformers, and saved ones -------------------------------------------------------------------------------

NARROW = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "llama": {"dataset": "ptb", "sizes": NARROW, "length": 16},
    "gpt2": {"dataset": "ptb", "sizes": {"n_embd": 16, "n_layer": 1, "n_head": 2}, "length": 16},
    "bert": {"dataset": "sst2", "sizes": {**NARROW, "initializer_range": 0.1}, "length": 16},
    "vit": {"dataset": "mnist", "sizes": {**NARROW, "patch_size": 14}},
}
SHORT = {
    "train_rows": 24,
    "test_rows": 8,
    "train_loss_rows": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "optim": "adamw_torch",
    "eval_steps": 2,
    "learning_rates": [1e-3],
    "teleport_warmup_steps": 1,
    "teleport_num_batches": 1,
    "teleport_batch_size": 2,
    "arms": {"null_space": {"teleport_method": "null_space"}},
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """The first rows of each data set, by its name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ptb", "sst2", "mnist")}
    for name, folder in folders.items():
        for path in (SHARED / name).glob("*.parquet"):
            pq.write_table(pq.read_table(path).slice(0, 60), folder / path.name)
    return folders


@pytest.fixture
def short(config, heads):
    """A function that writes the YAML file of two steps of a model on its data."""

    def write(model, **settings):
        own = MODELS[model]
        return config(**{**SHORT, "model": model, **own, "folder": str(heads[own["dataset"]]), **settings})

    return write


def trained(file, *words):
    """Run, and return the workload with its one run."""
    experiment, _ = run(file, *words)
    (one,) = experiment.runs
    return experiment.workload, one


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_train_and_teleport(short, name):
    workload, one = trained(short(name))
    rows = history(one)
    (event,) = [row for row in rows if "teleport/steps" in row]
    assert event["teleport/loss_after"] == pytest.approx(event["teleport/loss_before"], rel=1e-3)
    (test,) = [row for row in rows if "eval_test_loss" in row]
    assert 0 < test["eval_test_loss"] < 20
    assert ("eval_test_accuracy" in test) == (name in ("bert", "vit"))
    model, data = workload.make_model(workload.data), workload.data
    assert (
        type(model).__name__
        == {
            "llama": "LlamaForCausalLM",
            "gpt2": "GPT2LMHeadModel",
            "bert": "BertForSequenceClassification",
            "vit": "ViTForImageClassification",
        }[name]
    )
    config, tokens = model.config, data.tokenizer
    if name == "vit":
        assert (config.image_size, config.num_channels, config.num_labels, config.patch_size) == (28, 1, 10, 14)
    else:
        assert (config.vocab_size, config.max_position_embeddings) == (len(tokens), 16)
        assert config.pad_token_id == tokens.pad_token_id
    if name == "bert":
        assert config.num_labels == 2


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (
            "llama",
            ["--sizes.hiden_size", "8"],
            r"unknown key 'hiden_size' in .* 'llama'; the nearest is 'hidden_size'",
        ),
        ("gpt2", ["--sizes.n_emb", "8"], r"the nearest is 'n_embd'"),
        ("bert", ["--sizes.hidden_size", "many"], r"sizes of 'bert': (?s:.)*'hidden_size' expected int"),
        ("bert", ["--dataset", "ptb"], r"model = 'bert' classifies texts, but label_column = None"),
        (
            "llama",
            ["--dataset", "sst2"],
            r"'llama' reads running text, but label_column = 'label'; .* kind: text",
        ),
        ("vit", ["--dataset", "ptb"], r"takes data of kind 'image'"),
        ("vit", ["--save_model", "maybe"], r"save_model = 'maybe' is not allowed; allowed: true or false"),
    ],
)
def test_settings_that_do_not_suit_a_model(config, model, words, message):
    with pytest.raises(ValueError, match=message):
        plan(read(config(**{**SHORT, "model": model, **MODELS[model], "folder": None}), words))


@needs_data
def test_one_size_has_one_value_whatever_its_name(short):
    """GPT-2's `n_positions` is `max_position_embeddings` elsewhere, which the data decide where the file does not."""
    workload = plan(read(short("gpt2"), ["--sizes.n_positions", "20"])).workload
    assert workload.make_model(workload.data).config.n_positions == 20


@needs_data
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "mlp"])
def test_a_saved_model_is_gone_on_with(short, config, tmp_path, name):
    file = config(**SHORT) if name == "mlp" else short(name)
    _, first = trained(file, "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    files = ["done", "history.json", "model", "settings.json", "teleports.json"]
    assert sorted(path.name for path in first.folder.iterdir()) == files
    saved = first.folder / "model"
    workload, one = trained(file, "--pretrained", str(saved), "--output_dir", str(tmp_path / "tuning"))
    assert not (one.folder / "model").exists()
    kept = workload.network.auto.from_pretrained(saved)
    # The file names the saved model's sizes, and need not.
    for sizes in (workload.sizes, {}):
        model = replace(workload, sizes=sizes).make_model(workload.data)
        torch.testing.assert_close(model.state_dict(), kept.state_dict(), rtol=0, atol=0)
    losses = [[row["loss"] for row in history(r) if "loss" in row] for r in (first, one)]
    assert losses[0][0] != losses[1][0]
    if name in ("bert", "llama"):
        assert workload.data.tokenizer.get_vocab() == plan(read(file)).workload.data.tokenizer.get_vocab()


@needs_data
def test_another_number_of_classes_gets_a_new_head_and_the_tokenizer_stays(short, heads, tmp_path):
    """Fine-tuned on text with other words and three classes."""
    _, first = trained(short("bert"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved, other = first.folder / "model", tmp_path / "other"
    other.mkdir()
    for part in ("train", "test"):
        rows = [{"sentence": f"a {word} film", "label": i % 3} for i, word in enumerate(["good", "bad", "zzyzx"] * 8)]
        pd.DataFrame(rows).to_parquet(other / f"{part}.parquet")
    workload, _ = trained(short("bert", folder=str(other), pretrained=str(saved)))
    model, tokenizer = workload.make_model(workload.data), workload.data.tokenizer
    assert model.classifier.weight.shape[0] == 3
    assert tokenizer.get_vocab() == plan(read(short("bert"))).workload.data.tokenizer.get_vocab()
    kept = AutoModelForSequenceClassification.from_pretrained(saved)
    torch.testing.assert_close(model.bert.state_dict(), kept.bert.state_dict(), rtol=0, atol=0)


@needs_data
def test_saved_models_that_do_not_fit(short, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pretrained = 'no/where' has no saved model: .* save_model: true"):
        plan(read(short("bert"), ["--pretrained", "no/where"]))
    _, first = trained(short("bert"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved = first.folder / "model"

    def model_of(*words):
        workload = plan(read(short("bert"), ["--pretrained", str(saved), *words])).workload
        return workload.make_model(workload.data)

    with pytest.raises(ValueError, match=r"intermediate.dense.bias has the shape \[32\] by sizes = .* allowed: \[24\]"):
        model_of("--sizes.intermediate_size", "32")
    with pytest.raises(ValueError, match=r"max_position_embeddings = 20 of the data is not allowed; allowed: 16, that of"):
        model_of("--length", "20")
    with pytest.raises(ValueError, match=r"vocabulary_size = 50 is not allowed; allowed: none, for the tokenizer has its own"):
        model_of("--vocabulary_size", "50")
    with pytest.raises(ValueError, match=r"model = 'llama' is not allowed; allowed: a 'bert', which pretrained = "):
        plan(read(short("llama"), ["--pretrained", str(saved)]))
    # Runs from weights of their own are others.
    experiment = plan(read(short("bert")))
    execute(experiment)
    with pytest.raises(ValueError, match=r"pretrained = .* is not allowed; allowed: not given"):
        execute(plan(read(short("bert"), ["--pretrained", str(saved)])))
    (saved / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer, without which its embeddings mean nothing"):
        plan(read(short("bert"), ["--pretrained", str(saved)]))


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
