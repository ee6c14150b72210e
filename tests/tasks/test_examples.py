"""The tasks of `hf-teleport train`, run for real on a few rows of real data, a few steps with a teleport in them.

Sounds alone are made here, for there are no real ones at hand.
"""

import io
import json
import math
import os
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict

from hf_teleport.cli import main
from hf_teleport.tasks import TASKS, train
from hf_teleport.tasks.arguments import TextModelArguments
from hf_teleport.tasks.glue import GlueArguments, scores
from hf_teleport.tasks.labels import Labels
from hf_teleport.tasks.model import make_config, parse_overrides
from hf_teleport.tasks.run import checkpoint_of
from hf_teleport.tasks.seq2seq import Seq2SeqArguments, overlap
from hf_teleport.tasks.sound import decode, resample
from hf_teleport.tasks.text import row_length

from hub_double import running_hub

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CONFIGS = ROOT / "configs" / "examples"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data is not there: {DATA}")

SHORT = {
    "max_train_samples": 200,
    "max_eval_samples": 20,
    "max_steps": 3,
    "warmup_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 20,
    "logging_steps": 1,
    "save_steps": 2,
    "teleport_steps": 1,
    "teleport_num_batches": 1,
    "teleport_batch_size": 2,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
}

# Task, its config, smaller sizes, and the class that loads what was saved.
SMALL_TEXT = "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2,max_position_embeddings=32"
EXAMPLES = {
    "clm": ("ptb_clm", {"config_overrides": SMALL_TEXT, "block_size": 16}, "AutoModelForCausalLM"),
    "mlm": ("ptb_mlm", {"config_overrides": SMALL_TEXT, "max_seq_length": 16}, "AutoModelForMaskedLM"),
    "glue": ("sst2_glue", {"config_overrides": SMALL_TEXT, "max_seq_length": 16}, "AutoModelForSequenceClassification"),
    "seq2seq": (
        "ptb_seq2seq",
        {"config_overrides": "d_model=16,d_kv=8,d_ff=24,num_layers=1,num_heads=2", "max_source_length": 12},
        "AutoModelForSeq2SeqLM",
    ),
    "image_classification": (
        "cifar10_image",
        {
            "config_overrides": "image_size=16,patch_size=8,hidden_size=16,intermediate_size=24,num_hidden_layers=1,"
            "num_attention_heads=2"
        },
        "AutoModelForImageClassification",
    ),
    "time_series": (
        "etth1_series",
        {"config_overrides": "patch_length=8,patch_stride=8,d_model=16,num_attention_heads=2,num_hidden_layers=1,ffn_dim=24"},
        "PatchTSTForPrediction",
    ),
}


def words(**settings):
    return [str(word) for name, value in {**SHORT, **settings}.items() for word in (f"--{name}", value)]


def command(task, argv, monkeypatch):
    """Run `hf-teleport train`, in this process: the import of Transformers takes longer than the rest."""
    monkeypatch.chdir(ROOT)
    assert main(["train", task, *argv]) == 0


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def check_run(folder, steps=3, teleports=(1,)):
    log = history(folder)
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == steps
    assert np.isfinite(losses).all()
    events = [row for row in log if "teleport/loss_before" in row]
    assert [row["step"] for row in events] == list(teleports)
    for event in events:
        assert event["teleport/loss_after"] == pytest.approx(event["teleport/loss_before"], rel=0.01)
    measured = json.loads((folder / "all_results.json").read_text())
    assert math.isfinite(measured["eval_loss"])
    assert measured["train_samples"] > 0
    assert "## Teleportation" in (folder / "README.md").read_text()
    return measured


@needs_data
@pytest.mark.parametrize("task", EXAMPLES)
def test_a_task_trains_teleports_evaluates_and_saves(task, tmp_path, monkeypatch):
    config, sizes, auto = EXAMPLES[task]
    command(task, [f"configs/examples/{config}.yaml", *words(output_dir=tmp_path, **sizes)], monkeypatch)
    measured = check_run(tmp_path)
    wanted = {
        "clm": "perplexity",
        "mlm": "perplexity",
        "glue": "eval_accuracy",
        "seq2seq": "eval_word_f1",
        "image_classification": "eval_accuracy",
        "time_series": "test_mae",
    }
    assert wanted[task] in measured
    assert getattr(transformers, auto).from_pretrained(tmp_path).num_parameters() > 0


@needs_data
def test_the_saved_model_loads_without_this_package_and_a_run_goes_on_from_it(tmp_path, monkeypatch, capsys):
    config, sizes, auto = EXAMPLES["glue"]
    first, second = tmp_path / "first", tmp_path / "second"
    train("glue", [str(CONFIGS / f"{config}.yaml"), *words(output_dir=first, **sizes)])
    program = f"""
import sys
sys.modules["hf_teleport"] = None  # an import of it fails
from transformers import {auto}, pipeline
print(pipeline("text-classification", model={str(first)!r})("a good film")[0]["label"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in ("negative", "positive")

    # From the saved model and its tokenizer, on files of another kind, with a split of their own.
    rows = Dataset.from_dict({"review": [f"a {w} film" for w in ("good", "bad") * 20], "mood": ["yes", "no"] * 20})
    rows.to_csv(tmp_path / "rows.csv")
    measured = train(
        "glue",
        words(
            **{"model_name_or_path": first, "train_file": tmp_path / "rows.csv", "text_column_names": "review"},
            **{"label_column_name": "mood", "validation_split_percentage": 25, "output_dir": second},
        ),
    )
    assert measured["train_samples"] == 30
    assert transformers.AutoConfig.from_pretrained(second).id2label == {0: "no", 1: "yes"}


@needs_data
def test_a_run_is_resumed_from_its_last_checkpoint(tmp_path, capsys):
    config, sizes, _ = EXAMPLES["clm"]
    argv = [str(CONFIGS / f"{config}.yaml"), *words(output_dir=tmp_path, **sizes)]
    train("clm", argv)
    capsys.readouterr()
    train("clm", [*argv, "--max_steps", "5"])
    assert f"Resuming from {tmp_path / 'checkpoint-3'}" in capsys.readouterr().out
    # The log has the steps and the teleport from before, and two steps more.
    check_run(tmp_path, steps=5)
    train("clm", [*argv, "--resume_from_checkpoint", "false", "--teleport_steps", "2"])
    check_run(tmp_path, teleports=[2])


@needs_data
def test_evaluation_alone(tmp_path):
    config, sizes, _ = EXAMPLES["time_series"]
    measured = train("time_series", [str(CONFIGS / f"{config}.yaml"), *words(output_dir=tmp_path, do_eval="true", **sizes)])
    assert "train_loss" not in measured
    assert measured["eval_mse"] == pytest.approx(measured["eval_loss"], rel=1e-4)


@needs_data
def test_with_accelerate_on_two_processes(tmp_path):
    config, sizes, auto = EXAMPLES["clm"]
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "hf_teleport.cli",
            "train",
            "clm",
            f"configs/examples/{config}.yaml",
            *words(output_dir=tmp_path, **sizes),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(tmp_path)
    assert getattr(transformers, auto).from_pretrained(tmp_path).num_parameters() > 0


def test_a_regression_on_pairs_of_texts(tmp_path):
    words_ = [f"w{i}" for i in range(12)]
    pairs = {"first": [f"{a} {b}" for a in words_ for b in words_[:3]], "second": [f"{b} w1" for _ in words_ for b in words_[:3]]}
    Dataset.from_dict({**pairs, "grade": list(np.linspace(0, 5, 36))}).to_json(tmp_path / "rows.jsonl")
    settings = {"train_file": tmp_path / "rows.jsonl", "label_column_name": "grade", "train_tokenizer_vocab_size": 20}
    argv = words(config_name="bert", config_overrides=SMALL_TEXT, output_dir=tmp_path / "run", **settings)
    measured = train("glue", [*argv, "--text_column_names", "first", "second"])
    check_run(tmp_path / "run")
    assert measured["eval_mse"] == pytest.approx(measured["eval_loss"], rel=1e-4)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run").problem_type == "regression"


def test_a_run_is_pushed_with_its_card(tmp_path):
    (tmp_path / "a.txt").write_text("some words of text\n" * 40)
    settings = {"train_file": tmp_path / "a.txt", "train_tokenizer_vocab_size": 12, "block_size": 8, "config_name": "llama"}
    settings |= {"config_overrides": SMALL_TEXT, "push_to_hub": "true", "hub_model_id": "somebody/example", "save_strategy": "no"}
    with running_hub() as double:
        done = subprocess.run(
            [sys.executable, "-m", "hf_teleport.cli", "train", "clm", *words(output_dir=tmp_path / "run", **settings)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **double.environment(tmp_path / "home")},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    files = double.repos["somebody/example"].files
    assert {"model.safetensors", "config.json", "tokenizer.json", "eval_results.json"} <= set(files)
    assert "## Teleportation" in files["README.md"].decode()


def tone(hertz, rate=16000, seconds=0.05, width=2, channels=1):
    """A WAV file of a tone."""
    wave_ = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    whole = np.round(wave_ * (2 ** (8 * width - 1) - 1)).astype("<i4")
    octets = (whole + 128).astype(np.uint8).tobytes() if width == 1 else whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    frames = np.frombuffer(octets, np.uint8).reshape(-1, width).repeat(channels, axis=0).tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", "not compressed"))
        file.writeframes(frames)
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_audio_of_tones_made_here(source, tmp_path, monkeypatch):
    tones = {"low": (300, 310, 320, 330), "high": (3000, 3100, 3200, 3300)}
    if source == "folder":
        for name, hertz in tones.items():
            (tmp_path / "tones" / name).mkdir(parents=True)
            for h in hertz:
                (tmp_path / "tones" / name / f"{h}.wav").write_bytes(tone(h))
        where = {"train_dir": tmp_path / "tones", "validation_dir": tmp_path / "tones"}
    else:
        # One is at another rate, and longer than what the model sees.
        rows = [({"bytes": tone(h), "path": f"{h}.wav"}, name) for name, hertz in tones.items() for h in hertz]
        rows.append(({"bytes": tone(300, rate=8000, seconds=0.2), "path": "other.wav"}, "low"))
        Dataset.from_list([{"audio": sound, "label": name} for sound, name in rows]).to_parquet(tmp_path / "tones.parquet")
        where = {"train_file": tmp_path / "tones.parquet", "validation_file": tmp_path / "tones.parquet"}
    overrides = (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=24,conv_dim=[8,8],conv_kernel=[10,8],"
        "conv_stride=[5,4],num_feat_extract_layers=2,num_conv_pos_embeddings=8,num_conv_pos_embedding_groups=2,"
        "classifier_proj_size=8,mask_time_prob=0.0"
    )
    argv = words(config_name="wav2vec2", config_overrides=overrides, max_length_seconds=0.1, output_dir=tmp_path / "run", **where)
    command("audio_classification", argv, monkeypatch)
    measured = check_run(tmp_path / "run")
    assert "eval_accuracy" in measured
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run").label2id == {"high": 0, "low": 1}
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "run").sampling_rate == 16000


def test_folders_of_images(tmp_path):
    from PIL import Image as Picture

    draw = np.random.default_rng(0)
    for split, names in (("train", "abc"), ("validation", "bc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Picture.fromarray(draw.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / split / name / f"{i}.png")
    folders = {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "validation"}
    _, sizes, _ = EXAMPLES["image_classification"]
    train("image_classification", words(config_name="vit", output_dir=tmp_path / "run", **folders, **sizes))
    check_run(tmp_path / "run")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run").label2id == {"a": 0, "b": 1, "c": 2}
    # In plain Transformers, with the processor that was saved beside the model.
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run")(Picture.new("RGB", (9, 9)), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_are_decoded_without_libraries(width, channels, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    samples, rate = decode({"bytes": tone(1000, width=width, channels=channels), "path": None})
    assert rate == 16000
    wanted = np.sin(2 * np.pi * 1000 * np.arange(len(samples)) / rate)
    assert np.abs(samples - wanted).max() < 1.5 * 2.0 ** (1 - 8 * width) + 1e-6
    half = resample(samples, 16000, 8000)
    assert len(half) == len(samples) // 2
    with pytest.raises(ValueError, match="pip install soundfile"):
        decode({"bytes": b"fLaC and no more", "path": "x.flac"})


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_of_a_task(file, capsys):
    task = next(task for task, (config, *_) in EXAMPLES.items() if config == file.stem)
    # The first error is the last argument's, so that all of the file is known.
    with pytest.raises(SystemExit):
        train(task, [str(file), "--no_such_argument", "1", "--learning_rate", "much"])
    assert "argument --learning_rate" in capsys.readouterr().err
    assert yaml.safe_load(file.read_text())["teleport_method"] == "auto"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["clm", "--config_name", "gpt2"], "give train_file"),
        (["clm", "--train_file", "no/such.csv", "--config_name", "gpt2"], "train_file = 'no/such.csv' does not exist"),
        (["clm", "--dataset_name", "./no_such_folder"], "there is no folder or file"),
        (["clm", "--train_file", "setup.cfg", "--config_name", "gpt2"], "a file that ends in .csv"),
        (["clm", "none.yaml"], "there is no file"),
        (["clm", "{tmp}/wrong.yaml"], "the nearest is 'learning_rate'"),
        (["clm", "--train_file", "{tmp}/a.txt"], "there is no tokenizer"),
        (["clm", "--train_file", "{tmp}/a.txt", "--train_tokenizer_vocab_size", "9"], "there is no model"),
        (
            [
                *("clm", "--train_tokenizer_vocab_size", "9", "--config_name", "gpt2"),
                *("--config_overrides", "n_layr=2", "--train_file", "{tmp}/a.txt"),
            ],
            "the nearest is 'n_layer'",
        ),
        (
            [
                *("clm", "--train_tokenizer_vocab_size", "9", "--config_name", "gpt2"),
                *("--block_size", "64", "--train_file", "{tmp}/a.txt"),
            ],
            "fewer than 64 tokens",
        ),
        (
            [
                *("clm", "--train_tokenizer_vocab_size", "9", "--config_name", "gpt2", "--config_overrides", "n_positions=32"),
                *("--block_size", "64", "--train_file", "{tmp}/a.txt"),
            ],
            "block_size = 64 is not allowed; allowed: 1 to 32",
        ),
        (["glue", "--task_name", "sst3"], "allowed: one of ['cola'"),
        (["glue", "--train_file", "{tmp}/a.txt"], "column 'label' is not in the data"),
        (["seq2seq", "--train_file", "{tmp}/a.txt"], "exactly one of summary_column"),
        (["image_classification", "--train_file", "{tmp}/a.txt"], "column 'image' is not in the data"),
        (["image_classification", "--train_dir", "{tmp}/none"], "train_dir"),
        (["time_series", "--config_name", "patchtst"], "give train_file"),
        (["time_series", "--config_name", "bert", "--train_file", "setup.cfg"], "one of ['patchtst'"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_any_work(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "wrong.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "a.txt").write_text("some words of text\n" * 4)
    assert main(["train", *(word.format(tmp=tmp_path) for word in argv), "--output_dir", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_help_of_every_task(capsys):
    for task in TASKS:
        with pytest.raises(SystemExit) as ended:
            main(["train", task, "--help"])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert f"usage: hf-teleport train {task} [CONFIG.yaml] [--ARGUMENT VALUE ...]" in told
        assert "--teleport_method" in told
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "masked language modelling" in capsys.readouterr().out
    with pytest.raises(ValueError, match="allowed: one of"):
        train("dancing", [])


def test_a_checkpoint_that_is_not_there_is_said(tmp_path):
    training = transformers.TrainingArguments(str(tmp_path), resume_from_checkpoint=str(tmp_path / "none"), report_to="none")
    with pytest.raises(FileNotFoundError, match="allowed: a checkpoint's folder, true"):
        checkpoint_of(training)


def test_overrides_are_read_as_yaml_and_sizes_follow_from_them():
    assert parse_overrides("a=1,b=[1,2],c=gelu,d=1.5e-3,e=true") == {"a": 1, "b": [1, 2], "c": "gelu", "d": 1.5e-3, "e": True}
    assert parse_overrides("a={b: c, d: 2.0},e=1") == {"a": {"b": "c", "d": 2.0}, "e": 1}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_overrides("a")
    config = make_config(TextModelArguments(config_name="llama", config_overrides="hidden_size=64,num_attention_heads=4"))
    assert config.head_dim == 16
    with pytest.raises(ValueError, match="is a saved model"):
        make_config(TextModelArguments(model_name_or_path="some/model", config_overrides="hidden_size=64"))


def test_rows_have_as_many_tokens_as_there_are_positions():
    """RoBERTa's positions begin behind the padding token's id."""
    tokenizer = SimpleNamespace(model_max_length=1000)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    for kind, length in (("bert", 20), ("roberta", 18), ("mpnet", 18)):
        padding = 0 if kind == "mpnet" else 1  # MPNet's model takes 1 whatever is given
        config = transformers.AutoConfig.for_model(kind, **sizes, max_position_embeddings=20, pad_token_id=padding)
        assert row_length("max_seq_length", None, 1024, config, tokenizer) == length
        transformers.AutoModel.from_config(config)(torch.full((1, length), 5))
        with pytest.raises(ValueError, match=f"allowed: 1 to {length}"):
            row_length("max_seq_length", length + 1, 1024, config, tokenizer)


def test_labels():
    rows = Dataset.from_dict({"label": [3, 0, 1], "name": ["b", "a", "b"], "grade": [0.5, 1.0, 2.0], "one": [1, 1, 1]})
    assert Labels.of(rows).settings["id2label"] == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert Labels.of(rows, "name").numbers(["b", "a"]) == [1, 0]
    assert Labels.of(rows, "grade").settings["problem_type"] == "regression"
    with pytest.raises(ValueError, match="the label 'c'"):
        Labels.of(rows, "name").numbers(["c"])
    with pytest.raises(ValueError, match="two classes or more"):
        Labels.of(rows, "one")
    with pytest.raises(ValueError, match="whole numbers from 0"):
        Labels.of(Dataset.from_dict({"label": [-1, 0]}))


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import f1_score, matthews_corrcoef

    draw = np.random.default_rng(0)
    logits, truth = draw.normal(size=(50, 2)), draw.integers(0, 2, 50)
    found = logits.argmax(-1)
    measured = scores(transformers.EvalPrediction(logits, truth))
    assert measured["f1"] == pytest.approx(f1_score(truth, found))
    assert measured["matthews_correlation"] == pytest.approx(matthews_corrcoef(truth, found))
    assert measured["accuracy"] == (found == truth).mean()
    numbers = scores(transformers.EvalPrediction(truth[:, None] * 2.0, truth * 1.0))
    assert numbers == {"mse": pytest.approx(truth.mean()), "pearson": pytest.approx(1.0)}
    assert overlap("a b b", "b c b b") == pytest.approx(4 / 7)


def test_targets_of_seq2seq():
    rows = Dataset.from_list([{"translation": {"de": "ein Haus", "en": "a house"}, "text": "one two three", "sum": "one"}])
    assert Seq2SeqArguments(source_lang="de", target_lang="en").pairs(rows)[0] == {"source": "ein Haus", "target": "a house"}
    assert Seq2SeqArguments(first_words=2).pairs(rows)[0] == {"source": "one two three", "target": "one two"}
    assert Seq2SeqArguments(summary_column="sum").pairs(rows)[0]["target"] == "one"
    with pytest.raises(ValueError, match=r"train_file: row 1 has .*; allowed: texts by language, with 'fr' and 'en' among them"):
        Seq2SeqArguments(source_lang="fr", target_lang="en").check(rows, "train_file")


def test_a_glue_task_is_the_hubs():
    arguments = GlueArguments(task_name="cola")
    assert (arguments.dataset_name, arguments.dataset_config_name) == ("nyu-mll/glue", "cola")
    assert GlueArguments(task_name="sst2", train_file="rows.csv").dataset_name is None


def test_a_local_folder_with_a_test_split_is_evaluated_on_it(tmp_path):
    from hf_teleport.tasks.arguments import DataArguments
    from hf_teleport.tasks.tables import load_tables

    for split, count in (("train", 7), ("test", 3)):
        Dataset.from_dict({"text": ["word"] * count}).to_parquet(tmp_path / f"{split}.parquet")
    tables = load_tables(DataArguments(dataset_name=str(tmp_path), max_train_samples=5), lambda rows, source: None)
    assert isinstance(tables, DatasetDict)
    assert {name: len(rows) for name, rows in tables.items()} == {"train": 5, "validation": 3}
