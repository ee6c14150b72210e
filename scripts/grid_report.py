"""Table and plot of the CSV files that grid.py wrote: the final training loss of each arm at each learning rate.

    python scripts/grid_report.py docs/results/mnist_mlp_sgd.csv docs/results/mnist_mlp_sgd_joint.csv \
        --plot docs/results/mnist_mlp_sgd.png

An arm is a file and its number of teleported epochs. Differences are paired by seed; intervals are 95 % (Student's t).
"""

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from hf_teleport.reporting.plots import scale_of

Runs = dict[str, pd.DataFrame]


def load(file: Path) -> pd.DataFrame:
    """A CSV file of grid.py; the loss of a run that diverged is infinite, so that means and `last` do not pass over it."""
    rows = pd.read_csv(file)
    losses = ["train_loss", "test_loss"]
    return rows.assign(**{name: rows[name].fillna(np.inf) for name in losses})


def read(files: list[Path]) -> Runs:
    """One frame an arm; the arm without teleports is called 'baseline' and taken from wherever it is."""
    parts = defaultdict(list)
    for file in files:
        for epochs, rows in load(file).groupby("teleport_epochs"):
            parts["baseline" if epochs == 0 else f"{file.stem}, {epochs} epochs"].append(rows)
    return {name: pd.concat(frames) for name, frames in sorted(parts.items())}


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each run."""
    return rows.sort_values("step").groupby(["learning_rate", "seed"], as_index=False).last()


def interval(values: np.ndarray, digits: int = 4) -> str:
    """Mean and half-width of its 95 % interval."""
    mean = values.mean()
    if len(values) < 2 or not np.isfinite(values).all():
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def best_rate(rows: pd.DataFrame) -> float:
    """The learning rate with the lowest mean final training loss."""
    return float(final(rows).groupby("learning_rate")["train_loss"].mean().idxmin())


def at_best(rows: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each run at the arm's best learning rate, indexed by seed."""
    finals = final(rows)
    return finals[finals["learning_rate"] == best_rate(rows)].set_index("seed")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def rates_table(runs: Runs) -> str:
    """Final training loss, learning rates down, arms across."""
    rates = sorted({rate for rows in runs.values() for rate in rows["learning_rate"]})
    lines = []
    for rate in rates:
        cells = [f"{rate:g}"]
        for rows in runs.values():
            values = final(rows).query("learning_rate == @rate")["train_loss"].to_numpy()
            cells.append(interval(values) if len(values) else "")
        lines.append(cells)
    return markdown(["learning rate", *runs], lines)


def best_table(runs: Runs) -> str:
    """Each arm at its best learning rate."""
    header = ["arm", "best learning rate", "training loss", "minus the baseline's best", "test loss", "test accuracy"]
    header += ["CPU seconds", "of them teleporting"]
    reference = at_best(runs["baseline"])["train_loss"]
    lines = []
    for name, rows in runs.items():
        best = at_best(rows)
        difference = (best["train_loss"] - reference).dropna().to_numpy()
        cells = [
            name,
            f"{best_rate(rows):g}",
            interval(best["train_loss"].to_numpy()),
            "" if name == "baseline" else interval(difference),
            interval(best["test_loss"].to_numpy()),
            interval(best["test_accuracy"].to_numpy()),
            f"{best['cpu_seconds'].mean():.1f}",
            f"{best['teleport_seconds'].mean():.1f}",
        ]
        lines.append(cells)
    return markdown(header, lines)


def plot(runs: Runs, file: Path) -> None:
    """Final loss against the learning rate, and loss against steps and against time at each arm's best rate."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    rates, losses = set(), []
    for name, rows in runs.items():
        by_rate = final(rows).groupby("learning_rate")["train_loss"]
        rates |= set(by_rate.groups)
        axes[0].errorbar(by_rate.mean().index, by_rate.mean(), by_rate.std(), marker="o", capsize=3, label=name)
        best = rows[rows["learning_rate"] == best_rate(rows)].groupby("step").mean(numeric_only=True)
        axes[1].plot(best.index, best["train_loss"], marker="o", label=name)
        axes[2].plot(best["cpu_seconds"], best["train_loss"], marker="o", label=name)
        losses += [*by_rate.mean(), *best["train_loss"]]
    axes[0].set(xscale="log", xlabel="learning rate", ylabel="training loss", title="final, ± standard deviation")
    axes[0].set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes[0].minorticks_off()
    axes[1].set(xlabel="step", ylabel="training loss", title="at each arm's best rate")
    axes[2].set(xlabel="CPU seconds, teleports included", ylabel="training loss", title="the same, by time")
    for panel in axes:
        panel.set_yscale(scale_of(losses))
        panel.grid(alpha=0.25)
    axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of grid.py")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    args = parser.parse_args()
    runs = read(args.files)
    print(rates_table(runs), best_table(runs), sep="\n\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
