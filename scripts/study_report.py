"""Tables and plot of a study's CSV files, which grid.py wrote with --arm: is an arm better, and does it get there earlier?

    python scripts/study_report.py docs/results/ptb_llama.csv --plot docs/results/ptb_llama.png

Each arm stands at its own best learning rate, by mean final training loss. Training loss is that of fixed training rows, in eval
mode. Differences and times are paired by seed; intervals are 95 % (Student's t). 'Steps to the baseline' is where the loss passes
the final loss of the baseline's run of the same seed, as a share of that run's steps, on a straight line between evaluations;
likewise the CPU seconds. Where the learning rate decays, a run of only that length would end lower still.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from grid_report import Runs, at_best, best_rate, interval, load, markdown, plot, rates_table

from hf_teleport.lab import verdict

RUN = ["arm", "learning_rate", "seed"]


def read(files: list[Path], baseline: str) -> Runs:
    """One frame an arm, the baseline first.

    Raises:
        ValueError: no column 'arm', no arm of the baseline's name, or an arm with two runs of the same learning rate and seed.
    """
    rows = pd.concat([load(file) for file in files])
    if missing := [name for name in RUN if name not in rows]:
        raise ValueError(f"the files lack the columns {missing}: write them with grid.py --arm and these settings in its grid.")
    repeated = rows[rows.duplicated([*RUN, "step"])]
    if len(repeated):
        raise ValueError(
            f"two runs are {repeated.iloc[0][RUN].to_dict()}: runs that differ in other settings need an --arm each."
        )
    arms = list(dict.fromkeys(rows["arm"]))
    if baseline not in arms:
        raise ValueError(f"baseline = {baseline!r} is not allowed; allowed: one of the arms {arms}.")
    return {arm: rows[rows["arm"] == arm] for arm in sorted(arms, key=lambda arm: arm != baseline)}


def passage(run: pd.DataFrame, target: float) -> tuple[float, float] | None:
    """Step and CPU seconds at which a run's training loss first is at the target or below; None: never."""
    run = run.sort_values("step")
    clocks = verdict.passage(run, target, "step"), verdict.passage(run, target, "cpu_seconds")
    return clocks if np.isfinite(clocks).all() else None


def to_baseline(rows: pd.DataFrame, reference: pd.DataFrame) -> tuple[str, str]:
    """Shares of the baseline's steps and CPU seconds that an arm at its best needs for the baseline's final loss.

    Args:
        rows: the arm's evaluations.
        reference: the baseline's last evaluations at its best learning rate, indexed by seed.
    """
    best = rows[rows["learning_rate"] == best_rate(rows)]
    runs = {seed: run for seed, run in best.groupby("seed") if seed in reference.index}
    shares = []
    for seed, run in runs.items():
        end = reference.loc[seed]
        if (clocks := passage(run, end["train_loss"])) is not None:
            shares.append([clocks[0] / end["step"], clocks[1] / end["cpu_seconds"]])
    if not shares:
        return "-", "-"
    some = "" if len(shares) == len(runs) else f" ({len(shares)} of {len(runs)} seeds)"
    steps, cpu_seconds = (interval(column, 3) + some for column in np.array(shares).T)
    return steps, cpu_seconds


def study_table(runs: Runs, baseline: str) -> str:
    """Each arm at its best learning rate, against the baseline."""
    header = ["arm", "best learning rate", "seeds", "training loss", "minus the baseline's", "test loss", "test accuracy"]
    header += ["CPU seconds", "seconds teleporting", "steps to the baseline", "CPU seconds to the baseline"]
    reference = at_best(runs[baseline])
    lines = []
    for arm, rows in runs.items():
        best = at_best(rows)
        difference = (best["train_loss"] - reference["train_loss"]).dropna().to_numpy()
        accuracy = best["test_accuracy"].dropna().to_numpy()
        cells = [
            arm,
            f"{best_rate(rows):g}",
            str(len(best)),
            interval(best["train_loss"].to_numpy()),
            "" if arm == baseline or not len(difference) else interval(difference),
            interval(best["test_loss"].to_numpy()),
            interval(accuracy) if len(accuracy) else "",
            interval(best["cpu_seconds"].to_numpy(), 1),
            f"{best['teleport_seconds'].mean():.1f}",
            *to_baseline(rows, reference),
        ]
        lines.append(cells)
    # No task has accuracies in some arms only.
    unused = [index for index, name in enumerate(header) if name == "test accuracy" and not any(line[index] for line in lines)]
    kept = [[cell for index, cell in enumerate(line) if index not in unused] for line in [header, *lines]]
    return markdown(kept[0], kept[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of grid.py, with a column 'arm'")
    parser.add_argument("--baseline", default="baseline", help="the arm that the others are compared with")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    args = parser.parse_args()
    runs = read(args.files, args.baseline)
    print(study_table(runs, args.baseline), "Final training loss:", rates_table(runs), sep="\n\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
