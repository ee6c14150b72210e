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
from run_image_classification import make_trainer, parse
from transformers.utils import logging

from hf_teleport.lab.data import ImageTensors, load_images

MODELS = ["mlp", "cnn", "vit"]
CONFIGS = Path(__file__).parents[1] / "configs"


def train(model: str, teleport: bool, data: tuple[ImageTensors, ImageTensors]) -> Any:
    """Train one network as its config file says, with or without its teleport, and return the trainer."""
    words = ["--eval_strategy", "no"] if teleport else ["--eval_strategy", "no", "--teleport_epochs", "0"]
    images, arguments = parse([str(CONFIGS / f"digits_{model}.yaml"), *words])
    trainer = make_trainer(images, arguments, data)
    trainer.train()
    return trainer


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

    data = load_images("digits")
    header = ["run", "steps", "train loss", "test loss", "accuracy", "seconds", "of them teleporting"]
    rows = [header]
    figure, axes = plt.subplots(1, len(MODELS), figsize=(3.7 * len(MODELS), 3.2), layout="constrained")
    for axis, model in zip(axes, MODELS, strict=True):
        trainers = {}
        for label, teleport in (("baseline", False), ("teleport", True)):
            trainers[label] = train(model, teleport, data)
            rows.append(row(f"{model}, {label}", trainers[label]))
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
