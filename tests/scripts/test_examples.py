"""The two scripts in the style of Transformers' examples, run with a user's options."""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import forks

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no"]


def run(script, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "examples" / script), *SHORT, *map(str, words)]
    done = forks.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_an_image_classifier_learns_the_digits(tmp_path):
    words = ["--num_train_epochs", 4, "--learning_rate", 2e-3, "--per_device_train_batch_size", 32]
    words += ["--teleport_method", "null_space", "--teleport_num_batches", 1, "--teleport_energy_threshold", 0.999]
    run("run_image_classification.py", "--output_dir", tmp_path, *words)
    log = history(tmp_path)
    assert [row["step"] for row in log if "teleport/steps" in row] == [0]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_accuracy"] > 0.4
    assert pipeline("image-classification", model=str(tmp_path)).model.config.num_labels == 10


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_language_model_of_a_text(tmp_path, suffix):
    lines = [f"the number {i} comes before the number {i + 1}" for i in range(300)]
    rows = lines if suffix == "txt" else [json.dumps({"text": line}) for line in lines]
    (tmp_path / f"a.{suffix}").write_text("\n".join(rows))
    sizes = "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=2"
    words = ["--train_file", tmp_path / f"a.{suffix}", "--config_overrides", sizes, "--vocab_size", 300, "--block_size", 32]
    words += ["--max_steps", 12, "--learning_rate", 1e-2, "--per_device_train_batch_size", 4]
    words += ["--teleport_method", "basis", "--teleport_steps", 4, "--teleport_num_batches", 1]
    run("run_clm.py", "--output_dir", tmp_path / "run", *words)
    log = history(tmp_path / "run")
    (event,) = [row for row in log if "teleport/steps" in row]
    assert event["teleport/loss_after"] == pytest.approx(event["teleport/loss_before"], rel=1e-3)
    assert log[-2]["loss"] < 0.8 * log[0]["loss"]
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["perplexity"] > 1
    # In plain Transformers, and as a start for the same script.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.decode(tokenizer("the number 7")["input_ids"]) == "the number 7"
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    words = ["--train_file", tmp_path / f"a.{suffix}", "--block_size", 32, "--max_steps", 1, "--teleport_epochs", 0]
    run("run_clm.py", "--output_dir", tmp_path / "second", "--model_name_or_path", tmp_path / "run", *words)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.vocab_size == first.config.vocab_size
