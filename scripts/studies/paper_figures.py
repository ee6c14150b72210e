"""Two of the paper's figures from its experiments' settings: what a few eigenvectors capture, and what tau does to a teleport.

    python scripts/studies/paper_figures.py variance configs/paper/cpu/{mnist,cifar10}_sgd.yaml --output runs/variance.png
    python scripts/studies/paper_figures.py thresholds configs/paper/cpu/{mnist,cifar10}_sgd.yaml --output runs/thresholds.png

Each experiment gives the data, the network, the batch size of a teleport and, for `--train_steps`, the optimizer at the
paper-like learning rate. The numbers are written beside the figure as a CSV file.

- variance: for every layer that may move, the share of ||R||² in the leading singular vectors of its inputs on a teleport batch.
- thresholds: the loss and the gradient norm along one batch's turn by double backward, without any guard, at each energy
  threshold; and the loss on another batch. A step is as long as `--step` of the weights' norm, so that thresholds are compared at
  equal lengths.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from hf_teleport import TeleportConfig
from hf_teleport.lab.runs import make_trainer
from hf_teleport.lab.settings import plan, read
from hf_teleport.layers.subspace import Representation
from hf_teleport.methods import NullSpace
from hf_teleport.weights.isolation import evaluation_mode, preserved_rng
from hf_teleport.weights.snapshot import Snapshot

THRESHOLDS = [1.0, 0.999, 0.99, 0.9]
ROLES = {"mlp": "C0", "conv": "C1", "q": "C2", "k": "C3", "v": "C4", "o": "C5", "head": "C6"}


def loss_fn(model: nn.Module, batch: Any) -> Any:
    return model(**batch).loss


def prepared(file: str, train_steps: int) -> tuple[nn.Module, list[Any]]:
    """The experiment's model after so many steps of the baseline, and two teleport batches."""
    settings = read(file, ["--seeds", "0", "--max_steps", str(train_steps or -1), "--eval_on_start", "False"])
    settings |= {"learning_rates": [settings["paper_learning_rate"]], "save_strategy": "no", "eval_strategy": "no"}
    experiment = plan(settings)
    runs = {run.arm: run for run in experiment.runs}
    data = experiment.workload.load()
    baseline = make_trainer(runs["baseline"], experiment.workload, data, {})
    if train_steps:
        baseline.train()
    loader = make_trainer(runs["null_space"], experiment.workload, data, {}).get_teleport_dataloader(0)
    batches = iter(loader)
    return baseline.model, [next(batches), next(batches)]


def surveyed(model: nn.Module, batch: Any, **settings: Any) -> tuple[NullSpace, Any]:
    """The method after its look at a batch, with the layers that may move."""
    config = TeleportConfig(scope="batch", hessian="exact", max_growth=None, max_loss_change=None, **settings)
    method = NullSpace(model, loss_fn, config)
    point = method.evaluate(batch, 0)
    method.survey(point)
    method.fit()
    return method, point


def variance(task: str, model: nn.Module, batches: list[Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each layer and number of leading singular vectors, the largest of its groups."""
    method, point = surveyed(model, batches[0])
    for layer in method.layers:
        representation = Representation()
        uses = point.trace.uses[layer.weight][layer.region]
        representation.add(torch.cat([layer.rows(use.call.projector, use.call.input.detach()) for use in uses], dim=1))
        values, vectors = representation.decompose()
        shares = (values.square().cumsum(-1) / values.square().sum(-1, keepdim=True)).mean(0)
        width = vectors.shape[1]
        for k, share in enumerate(shares.tolist(), start=1):
            yield {"task": task, "layer": layer.name, "role": layer.role, "k": k, "of": width, "share": share}


def thresholds(task: str, model: nn.Module, batches: list[Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each threshold and step."""
    batch, other = batches
    start = Snapshot(model.parameters())
    for tau in THRESHOLDS:
        method, _ = surveyed(model, batch, energy_threshold=tau, step_size="relative", learning_rate=args.step)
        point = method.begin(batch, 0)
        dims = [(s.null_dim, s.dim) for s in method.subspaces.values()]
        null_share = sum(null for null, _ in dims) / sum(dim for _, dim in dims)
        for step in range(args.steps + 1):
            moved = {"loss": point.loss, "grad_norm": point.grad_norm, "other_loss": float(loss_fn(model, other).detach())}
            yield {"task": task, "tau": tau, "null_share": null_share, "step": step, **moved}
            move = method.propose(point)
            if move is None or not point.finite:
                break
            move(1.0)
            point = method.evaluate(batch, 0)
        start.restore()


def draw_variance(frame: pd.DataFrame) -> plt.Figure:
    tasks = list(frame["task"].unique())
    figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.4), layout="constrained", squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        for (_, role), rows in frame[frame["task"] == task].groupby(["layer", "role"], sort=False):
            axes.plot(rows["k"] / rows["of"], rows["share"], color=ROLES.get(role, "C7"), alpha=0.6, label=role)
        known = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(known.values(), known.keys(), fontsize="small")
        axes.set(title=task, xlabel="leading singular vectors, share of the width", ylabel="share of ||R||²")
    return figure


def draw_thresholds(frame: pd.DataFrame) -> plt.Figure:
    tasks = list(frame["task"].unique())
    shown = {"loss": "loss, this batch", "other_loss": "loss, another batch", "grad_norm": "gradient norm"}
    figure, panels = plt.subplots(
        len(shown), len(tasks), figsize=(3.6 * len(tasks), 2.6 * len(shown)), layout="constrained", squeeze=False
    )
    for column, task in enumerate(tasks):
        for row, (name, label) in enumerate(shown.items()):
            axes = panels[row, column]
            for tau, rows in frame[frame["task"] == task].groupby("tau", sort=False):
                axes.plot(rows["step"], rows[name], marker=".", label=f"tau = {tau:g}, null {rows['null_share'].iloc[0]:.0%}")
            axes.set(xlabel="step", ylabel=label, title=task if row == 0 else "")
        panels[0, column].legend(fontsize="x-small")
    return figure


FIGURES = {"variance": (variance, draw_variance), "thresholds": (thresholds, draw_thresholds)}


def main(words: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("experiments", nargs="+", metavar="YAML")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    parser.add_argument("--train_steps", type=int, default=0, help="train the baseline so long before; default: %(default)s")
    parser.add_argument("--steps", type=int, default=16, help="of a turn (the paper's t); default: %(default)s")
    parser.add_argument("--step", type=float, default=0.01, help="length of a step, share of the weights' norm")
    args = parser.parse_args(words)
    measure, draw = FIGURES[args.figure]
    rows = []
    for file in args.experiments:
        model, batches = prepared(file, args.train_steps)
        with preserved_rng(), evaluation_mode(model):
            rows += measure(Path(file).stem.rpartition("_")[0], model, batches, args)
    frame = pd.DataFrame(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(frame).savefig(args.output, dpi=110)
    print(f"{args.output} and {args.output.with_suffix('.csv')} are written.")
    return frame


if __name__ == "__main__":
    main()
