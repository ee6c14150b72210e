import json

import pytest
import torch
from datasets import Dataset

from hf_teleport.cli import main
from hf_teleport.inputs.models import load_model

from tiny_models import build

SIZES = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4", "vocab_size=50"]


def test_inspect_a_config_name_as_a_table(capsys):
    assert main(["inspect", "bert", "--set", *SIZES]) == 0
    out = capsys.readouterr().out
    assert "what a teleport would move" in out
    assert "tied" in out
    assert "of the elements may move" in out
    assert "those of 2 random samples" in out


def test_inspect_a_saved_folder_as_json(tmp_path, capsys):
    model, _ = build("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", "--length", "7", "--batch_size", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer for layer in found["layers"]}
    query = layers["model.layers.1.self_attn.q_proj"]
    assert query["role"] == "q"
    assert query["moved"]
    assert query["tokens"] == 7
    assert query["null_dim"] == query["null_dims"]["1"] == 32 - 7
    assert query["null_dims"]["1"] <= query["null_dims"]["0.999"] <= query["null_dims"]["0.99"]
    assert "embedding" in layers["model.embed_tokens"]["reason"]
    assert 0.5 < found["moved_share"] <= found["movable_share"] < 1


def test_rows_of_data(tmp_path, capsys):
    Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 3).to_parquet(tmp_path / "rows.parquet")
    assert (
        main(
            [
                "inspect",
                "gpt2",
                "--set",
                "n_embd=24",
                "n_layer=1",
                "n_head=2",
                "vocab_size=40",
                "--data",
                str(tmp_path / "rows.parquet"),
                "--json",
            ]
        )
        == 0
    )
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert next(layer for layer in layers if layer["role"] == "qkv")["tokens"] == 2 * 4


def test_rows_that_do_not_suit_the_model_are_said(tmp_path, capsys):
    Dataset.from_list([{"pixel_values": [1.0, 2.0]}] * 2).to_parquet(tmp_path / "rows.parquet")
    assert main(["inspect", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.parquet")]) == 2
    assert "cannot take these inputs (pixel_values)" in capsys.readouterr().err
    Dataset.from_list([{"sentence": "a film", "labels": 1}] * 2).to_parquet(tmp_path / "rows.parquet")
    assert main(["inspect", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.parquet")]) == 2
    assert "(tokenised, for instance): input_ids, and labels" in capsys.readouterr().err
    Dataset.from_list([{"input_ids": [1] * n, "labels": [1] * n} for n in (2, 3)]).to_parquet(tmp_path / "rows.parquet")
    assert main(["inspect", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.parquet")]) == 2
    assert "pad them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "no/such/place"], "hf-teleport:"),
        (["inspect", "bert", "--set", "hidden_size"], "write KEY=VALUE"),
        (["inspect", "bert", "--set", *SIZES, "--data", "nothing.parquet"], "existing"),
        (["inspect", "bert", "--set", "hidden_sizes=32"], "the nearest is 'hidden_size'"),
        (["inspect", "bert", "--set", "hidden_size=wide"], "is not allowed for 'bert'"),
        (["inspect", "llama", "--set", "hidden_size=1048576"], "too many for this machine's memory"),
    ],
)
def test_bad_input_is_said_with_exit_code_2(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


EXPERIMENT = """
dataset: digits
kind: image
model: mlp
learning_rates: [0.1]
seeds: [0]
eval_strategy: epoch
"""
ARMS = "arms: {baseline: {teleport_epochs: 0}, teleport: {}}\n"


@pytest.mark.parametrize("command", [["experiment"], ["compare"], ["train", "glue"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_train_epoch: 3", "unknown key 'num_train_epoch'"),
        ("3: 4", "unknown key 3"),
        ("learning_rates:\n\t- 1", "line 2, column 1"),
        ("seeds:\n\t- 1", "YAML wants blanks instead of tabs"),
        ("", "holds nothing, which is not allowed; allowed: a YAML file of keys and values"),
        ("- a", "holds a list"),
        ("base: 3", "base = [3]"),
        ("base: nowhere.yaml", "there is no file"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("seeds: 1\nseeds: 2", "wrong.yaml, line 2: key 'seeds' is given twice in one mapping, first in line 1; take one"),
        ("sizes:\n  a: 1\n  b: 2\n  a: 1", "wrong.yaml, line 4: key 'a' is given twice in one mapping, first in line 2"),
    ],
)
def test_a_file_that_cannot_be_is_named_before_any_work(command, text, said, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([*command, str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path) in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_train_epochs: [1, 2]", "num_train_epochs = [1, 2] is not allowed; allowed: a number"),
        ("per_device_train_batch_size: yes", "per_device_train_batch_size = True is not allowed; allowed: a whole number"),
        ("max_steps: 2.5", "max_steps = 2.5 is not allowed; allowed: a whole number"),
        ("optim: {a: 1}", "optim = {'a': 1} is not allowed; allowed: text"),
        ("sizes: 3", "sizes = 3 is not allowed; allowed: a mapping"),
        (
            "arms: {baseline: {}, teleport: {teleport_epoch: 1}}",
            "'teleport_epoch' in arm 'teleport'; the nearest is 'teleport_epochs'",
        ),
        ("arms: [a]", "allowed: a mapping from names"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(text, said, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(EXPERIMENT + ("" if text.startswith("arms") else ARMS) + text)
    assert main(["experiment", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(file) in error


def test_words_and_values_of_a_task_that_cannot_be(tmp_path, capsys):
    file = tmp_path / "task.yaml"
    file.write_text("config_name: bert\nlearning_rate: [1, 2]\n")
    assert main(["train", "glue", str(file)]) == 2
    assert f"{file}: learning_rate = [1, 2] is not allowed; allowed: a number." in capsys.readouterr().err
    assert main(["train", "glue", "--trian_file", "x.csv"]) == 2
    assert "unknown key 'trian_file' in the command line; the nearest is 'train_file'" in capsys.readouterr().err


def test_exit_codes(monkeypatch, capsys):
    def ends(error):
        def look(*args, **kwargs):
            raise error

        monkeypatch.setattr("hf_teleport.html.write", look)
        return main(["report", "x"])

    assert ends(ValueError("wrong")) == 2
    assert ends(KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError, match="the run's own"):  # which Python makes a traceback and 1 of
        ends(RuntimeError("the run's own"))
    with pytest.raises(SystemExit) as ended:
        main(["frobnicate"])
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["", "inspect", "doctor", "train", "experiment", "compare", "plot", "report"])
def test_help_fits_a_terminal_and_has_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert f"For instance:\n  hf-teleport {command}" in told
    assert bool(command) or "Exit codes: 0 done; 1 a run failed" in told


def test_sizes_are_for_config_names_only(tmp_path):
    with pytest.raises(ValueError, match="--set gives the sizes of a config name"):
        load_model(str(tmp_path), {"hidden_size": 3})


def test_compare_says_what_it_does_and_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--clock cpu_seconds", "warmup, random_move, matched_rate", "at equal time and at equal samples"):
        assert words in told
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    file = tmp_path / "one_arm.yaml"
    file.write_text("{dataset: mnist, model: mlp, arms: {null_space: {}}, learning_rates: [0.1], seeds: [0]}")
    assert main(["compare", str(file)]) == 2
    assert "allowed: one of them is 'baseline'" in capsys.readouterr().err


def test_symmetries_of_a_config_name(capsys):
    sizes = ["hidden_size=32", "intermediate_size=40", "num_hidden_layers=1", "num_attention_heads=2", "vocab_size=50"]
    assert main(["inspect", "llama", "--set", *sizes, "--method", "basis"]) == 0
    table = capsys.readouterr().out
    assert "symmetries that a change of basis can turn" in table
    assert "rotary" in table
    assert "blocking_gains" not in table
    assert main(["inspect", "llama", "--set", *sizes, "--method", "basis", "--json"]) == 0
    found = {s["kind"]: (s["blocks"], s["size"]) for s in json.loads(capsys.readouterr().out) if not s["reason"]}
    assert found == {"stream": (1, 32), "value_output": (2, 16), "scaling": (40, 1)}


def test_the_way_out_for_gains_that_training_has_made_uneven(tmp_path, capsys):
    model, _ = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--method", "basis"]) == 0
    assert "teleport_blocking_gains='hold'" in capsys.readouterr().out
