"""The paper's experiments side by side: one table, one CSV file and one figure from the folders that they left.

    python scripts/studies/paper_report.py runs/cpu/*_sgd runs/cpu/*_adam --output docs/results/paper
    python scripts/studies/paper_report.py --output docs/results/paper      # the figure again, from the CSV file

Each experiment is shown at the paper-like learning rate and at the baseline's best one, each arm with the same seeds. Time is CPU
time of the process, teleports included: other work on the machine does not enter into it.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from hf_teleport.lab.results import best_rates, curves, evaluations, final, paper_rate
from hf_teleport.lab.verdict import interval, passage
from hf_teleport.reporting.plots import scale_of

HEADER = ["data, optimizer", "rate", "baseline", "null space", "difference", "test, difference", "CPU time", "to baseline's loss"]
ARMS = ["baseline", "null_space"]


def time_to(run: pd.DataFrame, loss: float) -> float:
    """CPU seconds until a run's training loss is down at a loss, interpolated between evaluations; infinite if it never is."""
    return passage(run.sort_values("step"), loss, "cpu_seconds")


def line(name: str, label: str, frame: pd.DataFrame, rate: float) -> list[str] | None:
    """A row of the table; None while an arm has not been run with two seeds."""
    at = frame[frame["learning_rate"] == rate]
    ends = {arm: final(at[at["arm"] == arm]).set_index("seed") for arm in ARMS}
    seeds = ends["baseline"].index.intersection(ends["null_space"].index)
    if len(seeds) < 2:
        return None
    base, moved = (ends[arm].loc[seeds] for arm in ARMS)
    times = [
        [time_to(at[(at["arm"] == arm) & (at["seed"] == seed)], base.loc[seed, "train_loss"]) for arm in ARMS] for seed in seeds
    ]
    never = sum(not np.isfinite(reached) for _, reached in times)
    if not all(own for own, _ in times):
        passing = "the baseline ends no lower than it starts"
    else:
        passing = f"never ({never} of {len(seeds)} seeds)" if never else f"x {np.mean([r / own for own, r in times]):.2f}"
    return [
        name,
        f"{rate:g} ({label})",
        *(f"{run['train_loss'].mean():.4g}" for run in (base, moved)),
        _signed((moved["train_loss"] - base["train_loss"]).to_numpy()),
        _signed((moved["test_loss"] - base["test_loss"]).to_numpy()),
        f"x {(moved['cpu_seconds'] / base['cpu_seconds']).mean():.2f}",
        passing,
    ]


def _signed(differences: np.ndarray) -> str:
    """Mean and 95 % interval; bold where it does not contain zero."""
    found = interval(differences)
    if found.half is None:
        return "diverged"
    return f"**{found}**" if found.sign else str(found)


def draw(shown: dict[str, tuple[Any, dict[str, float]]], path: Path) -> None:
    """Training loss at the baseline's best rate against steps (above) and CPU seconds (below), an experiment a column."""
    columns = 4
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(2 * rows, columns, figsize=(3.4 * columns, 4.6 * rows), layout="constrained", squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (name, (lines, rates)) in enumerate(shown.items()):
        upper, lower = panels[2 * (i // columns), i % columns], panels[2 * (i // columns) + 1, i % columns]
        for arm in ARMS:
            run = lines[(lines["arm"] == arm) & (lines["learning_rate"] == rates["baseline"])]
            spread = run["train_loss_sd"].fillna(0)
            for axes, along in ((upper, run["step"]), (lower, run["cpu_seconds"])):
                axes.set_axis_on()
                axes.plot(along, run["train_loss"], marker=".", label=arm)
                axes.fill_between(along, run["train_loss"] - spread, run["train_loss"] + spread, alpha=0.2)
                axes.set(title=f"{name}, {rates['baseline']:g}" if axes is upper else "")
                axes.set_xlabel("step" if axes is upper else "CPU seconds, teleports included", fontsize="small")
        for axes in (upper, lower):
            axes.set_yscale(scale_of(value for drawn in upper.get_lines() for value in drawn.get_ydata()))
        upper.legend(fontsize="x-small")
    figure.savefig(path, dpi=80)


def kept(path: Path) -> dict[str, tuple[Any, dict[str, float]]]:
    """What `draw` takes, from a CSV file that this script wrote. As `best_rates`: of the rates that most seeds have run with."""
    shown = {}
    for name, lines in pd.read_csv(path).groupby("experiment", sort=False):
        ends = lines[(lines["arm"] == "baseline") & (lines["step"] == lines["step"].max())]
        whole = ends[ends["seeds"] == ends["seeds"].max()]
        shown[name] = lines, {"baseline": float(whole.loc[whole["train_loss"].idxmin(), "learning_rate"])}
    return shown


def main(words: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="path of the CSV file and the figure, without their endings")
    args = parser.parse_args(words)
    if not args.folders:
        draw(kept(args.output.with_suffix(".csv")), args.output.with_suffix(".png"))
        return ""
    table, frames, shown = [], [], {}
    for folder in args.folders:
        frame = evaluations(folder)
        frame = frame[frame["arm"].isin(ARMS)]
        frames.append(curves(frame).assign(experiment=folder.name))
        best, paper = best_rates(frame), paper_rate(folder)
        lines = [
            line(folder.name, label, frame, rate)
            for rate, label in {best["baseline"]: "best", paper: "paper-like" if paper != best["baseline"] else "both"}.items()
            if rate is not None
        ]
        table += [cells for cells in lines if cells is not None]
        if any(lines):
            shown[folder.name] = frames[-1], best
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_csv(args.output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(shown, args.output.with_suffix(".png"))
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *table])
    print(text)
    return text


if __name__ == "__main__":
    main()
