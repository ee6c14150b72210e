"""A first look: three networks on real images (the digits that ship with scikit-learn), with and without teleportation.

    make quickstart

Both runs of a pair start from the same weights and see the same batches. Takes about two minutes on two CPU cores.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers import ProgressCallback
from transformers.utils import logging

from hf_teleport.lab.runs import make_trainer
from hf_teleport.lab.settings import plan
from hf_teleport.metrics import trainer_arguments

SETTINGS = {
    "dataset": "digits",
    "kind": "image",
    "output_dir": "runs/quickstart",
    "seeds": 42,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 512,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "save_strategy": "no",
    "logging_steps": 5,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "arms": {"baseline": {"teleport_epochs": 0}, "teleport": {"teleport_method": "null_space", "teleport_epochs": 1}},
}
VIT = {"patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
# The learning rates are the best of a grid for training without teleportation, docs/results.md. Patches and tokens outnumber the
# dimensions, so that there is next to no exact null space.
MODELS = {
    "mlp": {"optim": "sgd", "learning_rates": 0.3},
    "cnn": {
        "sizes": {"channels": [1, 16, 32, 64]},
        "optim": "sgd",
        "learning_rates": 0.3,
        "teleport_energy_threshold": 0.999,
    },
    "vit": {"sizes": VIT, "optim": "adamw_torch", "learning_rates": 0.002, "teleport_energy_threshold": 0.999},
}


def train(model: str) -> dict[str, Any]:
    """Train one network with and without its teleport, and return the trainers."""
    experiment = plan({**SETTINGS, "model": model, **MODELS[model]})
    data, trainers = experiment.workload.data, {}
    for run in experiment.runs:
        trainer = trainers[run.arm] = make_trainer(run, experiment.workload, data, trainer_arguments(data.measure))
        trainer.args.disable_tqdm = False
        trainer.add_callback(ProgressCallback)
        trainer.train()
    return trainers


def row(name: str, trainer: Any) -> list[str]:
    """The table's row for a finished run."""
    logs = trainer.state.log_history
    seconds = next(entry["train_runtime"] for entry in reversed(logs) if "train_runtime" in entry)
    teleports = sum(report.seconds for report in trainer.teleport_reports)
    scores = trainer.evaluate()
    return [
        name,
        str(trainer.state.global_step),
        f"{scores['eval_train_loss']:.4f}",
        f"{scores['eval_test_loss']:.4f}",
        f"{scores['eval_test_accuracy']:.3f}",
        f"{seconds:.1f}",
        f"{teleports:.1f}",
    ]


def plot(axis: Any, title: str, trainers: dict[str, Any]) -> None:
    """Training loss against steps, teleports marked."""
    for label, trainer in trainers.items():
        points = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
        for entry in trainer.state.log_history:
            if "teleport/steps" in entry:
                axis.axvline(entry["step"], color="grey", linestyle=":", linewidth=1.5, label="the teleport")
    axis.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
    axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for the plot")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    torch.set_num_threads(min(2, torch.get_num_threads()))

    header = ["run", "steps", "train loss", "test loss", "accuracy", "seconds", "of them teleporting"]
    rows = [header]
    figure, axes = plt.subplots(1, len(MODELS), figsize=(3.7 * len(MODELS), 3.2), layout="constrained")
    for axis, model in zip(axes, MODELS, strict=True):
        trainers = train(model)
        rows += [row(f"{model}, {arm}", trainer) for arm, trainer in trainers.items()]
        plot(axis, model, trainers)
    figure.savefig(folder / "quickstart.png", dpi=150)

    widths = [max(len(line[i]) for line in rows) for i in range(len(header))]
    print()
    for line in rows:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    print(f"\nTraining and test loss are in eval mode, after training. Plot: {folder / 'quickstart.png'}")
    print("One seed shows how it works, not whether it helps: docs/results.md has the comparison with tuned baselines.")


if __name__ == "__main__":
    main()
