"""A first look: a small Llama learns Python by AdamW, and by AdamW with the basis that follows training.

    make quickstart

The text is the Python source of packages in this environment. Both runs start from the same weights, see the same batches, and
have the settings that are best for each of them (configs/study/quickstart_tuned.yaml): one learning rate for embeddings and
output head, another for the rest, and the warm-up. Takes two minutes on two CPU cores.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from hf_teleport.lab.history import History
from hf_teleport.lab.runs import make_trainer
from hf_teleport.lab.settings import plan
from hf_teleport.lab.verdict import passage
from hf_teleport.metrics import trainer_arguments
from hf_teleport.reporting.plots import style

SETTINGS = {
    "dataset": "python",
    "package_megabytes": 1,
    "length": 128,
    "model": "llama",
    "sizes": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 344,
        "tie_word_embeddings": False,
    },
    "train_loss_rows": 32,
    "test_rows": 32,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rates": 5e-4,
    "embedding_learning_rate": 1.6e-2,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "use_cpu": True,
    "arms": {"baseline": {"teleport_epochs": 0}, "following": {"teleport_method": "basis"}},
}
WARMUP = {"baseline": 1 / 3, "following": 1 / 6}  # of the run
NAMES = {"baseline": "AdamW", "following": "AdamW, following basis"}

EXPECTED = """
Expect the second run to end lower, and to pass AdamW's final loss before its own end. By how much differs: another seed draws
other weights and batches, other versions of the packages are another text, and another machine rounds differently."""


class Bar(TrainerCallback):
    """A run's progress bar, with its training loss."""

    def __init__(self, name: str):
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=self._name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def train(settings: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """For each run its evaluations: step, cpu_seconds of training so far, train_loss and test_loss."""
    experiment = plan(settings)
    print("Reading and tokenizing the Python files of this environment; the next time they come from the cache.", flush=True)
    data = experiment.workload.data
    print(f"{data.train.columns['input_ids'].numel():,} tokens to train on.", flush=True)
    found = {}
    for run in experiment.runs:
        history = History()
        trainer = make_trainer(run, experiment.workload, data, trainer_arguments(data.measure))
        for callback in (history, Bar(NAMES[run.arm])):
            trainer.add_callback(callback)
        trainer.train()
        log = pd.DataFrame(history.rows).groupby("step")[["cpu_seconds", "eval_train_loss", "eval_test_loss"]].first()
        found[NAMES[run.arm]] = log.dropna().reset_index().rename(columns=lambda name: name.removeprefix("eval_"))
    return found


def table(found: dict[str, pd.DataFrame]) -> Table:
    """Final values, and where each run passes the final training loss of the first one."""
    base = next(iter(found.values())).iloc[-1]
    shown = Table("run", box=None, pad_edge=False)
    for column in ("train loss", "test loss", "CPU seconds", "passes AdamW's final train loss at"):
        shown.add_column(column, justify="right")
    for name, log in found.items():
        end = log.iloc[-1]
        shares = [passage(log, base["train_loss"], column) / base[column] for column in ("step", "cpu_seconds")]
        passed = "{:.0%} of its steps, {:.0%} of its time".format(*shares) if math.isfinite(shares[0]) else "never"
        shown.add_row(name, f"{end['train_loss']:.3f}", f"{end['test_loss']:.3f}", f"{end['cpu_seconds']:.0f}", passed)
    return shown


def draw(found: dict[str, pd.DataFrame], path: Path) -> None:
    """Training loss against steps and CPU seconds, for light pages, and in a second file for dark ones."""
    for dark, file in ((False, path), (True, path.with_stem(f"{path.stem}_dark"))):
        with style(dark):
            figure = Figure(figsize=(8, 3), layout="constrained")
            for axes, column in zip(figure.subplots(1, 2, sharey=True), ("step", "cpu_seconds"), strict=True):
                for name, log in found.items():
                    # The first steps are much alike, and would hide the rest.
                    shown = log.iloc[len(log) // 4 :]
                    axes.plot(shown[column], shown["train_loss"], marker=".", label=name)
                axes.axhline(next(iter(found.values()))["train_loss"].iloc[-1], color="grey", linestyle=":", linewidth=1)
                axes.set(xlabel=column.replace("_", " "))
                axes.grid(alpha=0.25)
            figure.axes[0].set(ylabel="training loss")
            figure.axes[0].legend()
            figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for the plots")
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the text")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    arms = {name: own | {"warmup_steps": round(WARMUP[name] * args.steps)} for name, own in SETTINGS["arms"].items()}
    found = train(SETTINGS | {"arms": arms, "max_steps": args.steps, "seeds": args.seed, "output_dir": str(args.output)})
    plot = args.output / "quickstart.png"
    draw(found, plot)
    print()
    Console(width=None if sys.stdout.isatty() else 120).print(table(found))
    print(f"\nPlot: {plot}, and for dark pages {plot.stem}_dark.png")
    print(EXPECTED)


if __name__ == "__main__":
    main()
