import json

import pytest
import torch
from datasets import Dataset

from hf_teleport.cli import main

from tiny_models import build

SIZES = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4", "vocab_size=50"]


def test_inspect_a_config_name_as_a_table(capsys):
    assert main(["inspect", "bert", "--set", *SIZES]) == 0
    out = capsys.readouterr().out
    assert "what method 'null_space' would move" in out
    assert "tied" in out
    assert "of the elements may move" in out
    assert "null spaces of 2 random samples" in out


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
        (["inspect", "bert", "--set", *SIZES, "--data", "nothing.parquet"], "--data = 'nothing.parquet' does not exist"),
        (["inspect", "bert", "--set", "hidden_sizes=32"], "the nearest is 'hidden_size'"),
        (["inspect", "bert", "--set", "hidden_size=wide"], "is not allowed for 'bert'"),
        (["inspect", "llama", "--set", "hidden_size=1048576"], "too many for this machine's memory"),
    ],
)
def test_bad_input_is_said_with_exit_code_2(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_symmetries_of_a_config_name(capsys):
    sizes = ["hidden_size=32", "intermediate_size=40", "num_hidden_layers=1", "num_attention_heads=2", "vocab_size=50"]
    assert main(["inspect", "llama", "--set", *sizes, "--method", "basis"]) == 0
    table = capsys.readouterr().out
    assert "symmetries that a change of basis can turn" in table
    assert "rotary" in table
    assert "only if `symmetries` names it" in " ".join(table.split())  # 'scaling', which is off by default
    assert "blocking_gains" not in table
    assert main(["inspect", "llama", "--set", *sizes, "--method", "basis", "--json"]) == 0
    found = {s["kind"]: (s["blocks"], s["size"]) for s in json.loads(capsys.readouterr().out) if not s["reason"]}
    assert found == {"stream": (1, 32), "value_output": (2, 16), "scaling": (40, 1)}


def test_what_the_events_of_a_run_will_cost(capsys):
    sizes = ["hidden_size=32", "intermediate_size=40", "num_hidden_layers=1", "num_attention_heads=2", "vocab_size=50"]
    assert main(["inspect", "llama", "--set", *sizes, "--method", "basis", "--max_steps", "90", "--processes", "2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "A run of 90 steps has 3 events, before steps 10, 20, 40, and reads the gradients of 8 steps" in told
    # The residual stream, and two heads of 16.
    assert "The second moments take 6.0 KiB" in told
    assert "Process 0 decomposes on cpu, in float64, while training waits: 1 of 32 x 32;" in told
    assert "Process 1 decomposes on cpu, in float64, while training waits: 2 of 16 x 16;" in told


def test_the_way_out_for_gains_that_training_has_made_uneven(tmp_path, capsys):
    model, _ = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--method", "basis"]) == 0
    assert "teleport_blocking_gains='hold'" in capsys.readouterr().out


def test_models_that_cannot_be_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, _ = build("llama", dtype=torch.float32)
    for name in ("cut", "no_config", "broken", "no_type"):
        model.save_pretrained(name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "no_config" / "config.json").unlink()
    (tmp_path / "no_config" / "generation_config.json").unlink()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": ')
    (tmp_path / "no_type" / "config.json").write_text("{}")
    for name, said in (
        ("cut", "model = 'cut' could not be loaded: model.safetensors (70 KiB) is cut short or broken"),
        ("no_config", "model = 'no_config' has no config.json"),
        ("broken", "is not a valid JSON file"),
        ("no_type", "Should have a `model_type` key"),
        ("cut/config.json", "model = 'cut/config.json' is a file, which is not allowed; give a folder"),
        ("./none", "model = './none': there is no such folder; give a folder as model.save_pretrained writes it, or a Hub id"),
        ("no/such/place", "model = 'no/such/place': there is no such folder"),
        ("nobody/nothing", "model = 'nobody/nothing' could not be loaded: We couldn't connect to"),
    ):
        assert main(["inspect", name]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_encoder_decoders_by_name(name, capsys):
    sizes = ["d_model=16", "d_kv=8", "d_ff=24", "num_layers=1", "num_heads=2", "vocab_size=30"]
    assert main(["inspect", name, "--set", *sizes, "--batch_size", "1", "--length", "3"]) == 0
    assert "what method 'null_space' would move" in capsys.readouterr().out


def test_sizes_that_make_no_model(capsys):
    for sizes, said in (
        (["hidden_size=-16"], "negative dimension"),
        (["hidden_size=16", "num_attention_heads=3"], "not a multiple"),
    ):
        assert main(["inspect", "bert", "--set", *sizes]) == 2
        assert said in capsys.readouterr().err


def test_rows_of_text_or_of_another_encoding(tmp_path, capsys):
    (tmp_path / "rows.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    assert main(["inspect", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.csv")]) == 2
    assert "is not UTF-8: line 2 has the byte 0xe9" in capsys.readouterr().err
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    assert main(["inspect", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.csv")]) == 2
    assert "no column has numbers; allowed: rows as training sees them (tokenised)" in capsys.readouterr().err


def test_other_methods(capsys):
    assert main(["inspect", "bert", "--set", *SIZES, "--method", "level_set"]) == 0
    assert "what method 'level_set' may move" in capsys.readouterr().out
    assert main(["inspect", "bert", "--set", *SIZES, "--method", "level_set", "--json"]) == 0
    assert all(layer["movable"] != bool(layer["reason"]) for layer in json.loads(capsys.readouterr().out))
    assert main(["inspect", "bert", "--set", *SIZES, "--method", "symmetry"]) == 2
    assert "method = 'symmetry' is not allowed for this model" in capsys.readouterr().err


def test_numbers_for_people(capsys):
    assert main(["inspect", "bert", "--set", *SIZES, "--length", "300", "--batch_size", "4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "may take " in told
    assert "1,200" in told
    assert "e+0" not in told
