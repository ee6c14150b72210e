"""Experiments of a few steps on the first rows of real data, for the tests of `hf_teleport.lab`."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hf_teleport import TeleportTrainer
from hf_teleport.lab.runs import execute
from hf_teleport.lab.settings import plan, read

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"needs the data sets in {SHARED}")

# 6 steps of an MLP on MNIST, with a teleport before the third.
DEFAULTS = {
    "dataset": "mnist",
    "model": "mlp",
    "sizes": {"hidden_sizes": [24, 24], "hidden_act": "leaky_relu"},
    "train_rows": 96,
    "test_rows": 40,
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

# 2 steps of a model of Transformers, with a teleport before the second.
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

NARROW = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**NARROW, "num_key_value_heads": 1, "head_dim": 8}
PTB = {"dataset": "ptb", "length": 16}
MODELS = {
    "llama": {**PTB, "sizes": {**NARROW, "num_key_value_heads": 1}},
    "qwen3": {**PTB, "sizes": {**GROUPED, "tie_word_embeddings": True}},
    "gemma": {**PTB, "sizes": GROUPED},
    "gpt2": {**PTB, "sizes": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
    "bert_mlm": {**PTB, "sizes": {**NARROW, "initializer_range": 0.1}},
    "bert": {"dataset": "sst2", "sizes": {**NARROW, "initializer_range": 0.1}, "length": 16},
    "llama_classifier": {"dataset": "sst2", "sizes": {**NARROW, "num_key_value_heads": 1}, "length": 16},
    "vit": {"dataset": "mnist", "sizes": {**NARROW, "patch_size": 14}},
    "forecaster": {"dataset": "etth1", "sizes": NARROW, "context": 8, "horizon": 3, "shift": None},
}


def first_rows(name, folder, count):
    """The first rows of each file of a data set, written into a folder."""
    for path in (SHARED / name).glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, count), folder / path.name)
    return folder


def run(file, *words):
    experiment = plan(read(file, words))
    return experiment, execute(experiment)


def trained(file, *words):
    """Run, and return the workload with its one run."""
    experiment, _ = run(file, *words)
    (one,) = experiment.runs
    return experiment.workload, one


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
