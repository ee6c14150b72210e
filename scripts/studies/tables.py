"""Tables of docs/results.md from committed evaluations.

    python scripts/studies/tables.py runs/study/ptb_tuned docs/results/ptb_tuned.csv    # evaluations of an experiment into a CSV
    python scripts/studies/tables.py docs/results/ptb_tuned.csv                         # tables from it
    python scripts/studies/tables.py docs/results/ptb_tuned.csv --reference muon        # against another arm
    python scripts/studies/tables.py runs/study/fine_tuning docs/results/fine_tuning.csv    # a folder of experiments: one table

The first table has every run with one seed, by its final training loss: the trials of a search. The second one compares what
was run with more seeds: mean and 95 % interval (Student's t) over the seeds, and when the reference's final training loss is
passed, in shares of the reference's own steps and CPU seconds. Of a folder of experiments there is one table: in each of them
every arm against the reference, both at their own best settings, with the mean difference over the seeds and its interval, and
when the reference's final training loss is passed.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from hf_teleport.lab.results import best_run, evaluations, final
from hf_teleport.lab.runs import ALL_SETTINGS
from hf_teleport.lab.verdict import Contestant, Verdict, interval, verdict

COLUMNS = ["arm", "learning_rate", "seed", "step", "samples", "cpu_seconds", "train_loss", "test_loss", "metric"]
# What ends the name of an arm's control, such as `following.identity`. Numbers in names have points too.
_CONTROL = r"\.[a-z_]+$"


def export(runs: Path, target: Path) -> None:
    """Write the evaluations of an experiment's finished runs, or of several experiments in one folder."""
    folders = [runs] if (runs / ALL_SETTINGS).exists() else sorted(path.parent for path in runs.glob(f"*/{ALL_SETTINGS}"))
    frames = [evaluations(folder)[COLUMNS].sort_values(COLUMNS[:4]) for folder in folders]
    if folders != [runs]:
        for folder, frame in zip(folders, frames, strict=True):
            frame.insert(0, "experiment", folder.name)
    frame = pd.concat(frames)
    frame.round({"cpu_seconds": 1, "train_loss": 4, "test_loss": 4, "metric": 4}).to_csv(target, index=False)


def trials(frame: pd.DataFrame) -> list[str]:
    """A Markdown table of the first seed's runs, those of an arm together, the best one first."""
    ends = final(frame[frame["seed"] == frame["seed"].min()])
    ends = ends.assign(start=ends["arm"].str.partition("+")[0]).sort_values(["start", "train_loss"])
    lines = ["| run | learning rate | training loss | test loss |", "| --- | --- | --- | --- |"]
    return lines + [f"| {r.arm} | {r.learning_rate:g} | {r.train_loss:.3f} | {r.test_loss:.3f} |" for r in ends.itertuples()]


def comparison(frame: pd.DataFrame, reference: Contestant) -> list[str]:
    """A Markdown table of all that was run with several seeds, against one of it."""
    seeds = frame.groupby(["arm", "learning_rate"])["seed"].nunique()
    lines = [
        "| run | learning rate | training loss | test loss | CPU time | reference's loss: steps | CPU time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, rate in seeds[seeds > 1].index:
        found = verdict(frame, reference, (arm, rate), "cpu_seconds")
        test = interval(final(frame[(frame["arm"] == arm) & (frame["learning_rate"] == rate)])["test_loss"])
        passed = [f"x {found.steps_to_loss}", f"x {found.time_to_loss}"]
        if found.never:
            passed = [f"never with {found.never} of {found.seeds}"] * 2
        own = ["reference", ""] if (arm, rate) == reference else passed
        lines.append(f"| {arm} | {rate:g} | {found.train_loss} | {test} | x {found.time} | {' | '.join(own)} |")
    return lines


def passed(found: Verdict) -> str:
    """Steps to the reference's final training loss, as a multiple of the reference's own."""
    if found.never == found.seeds:
        return "never"
    some = f" ({found.seeds - found.never} of {found.seeds} seeds)" if found.never else ""
    return f"x {found.steps_to_loss}{some}"


def best_runs(frame: pd.DataFrame) -> dict[str, Contestant]:
    """For each arm its best run, among its searched settings and without its controls."""
    own = frame[~frame["arm"].str.contains(_CONTROL)]
    best = {str(arm): best_run(runs) for arm, runs in own.groupby(own["arm"].str.partition("+")[0])}
    return {arm: run for arm, run in best.items() if run is not None}


def described(run: Contestant) -> str:
    """A run's learning rate, and the settings that its search has changed."""
    changed = re.sub(r"(?<!\de)-(?=[\d.]+(e|;|$))", " ", run[0].partition("+")[2].replace("+", "; ")).replace("_", " ")
    return f"{run[1]:g} ({changed})" if changed else f"{run[1]:g}"


def pairs(frame: pd.DataFrame, reference: str) -> list[str]:
    """A Markdown table of several experiments: each arm against the reference, both at their best settings, by seeds."""
    lines = [
        f"| run | arm | rates | training loss, {reference} | arm | difference | difference in test loss | passes it: steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, own in frame.groupby("experiment", sort=False):
        best = best_runs(own)
        ends = final(own).set_index(["arm", "learning_rate", "seed"]).sort_index()[["train_loss", "test_loss"]]
        base = ends.loc[best[reference]]
        for arm in sorted(best.keys() - {reference}):
            found = ends.loc[best[arm]]
            train, test = (interval((found - base)[column].dropna().to_numpy()) for column in ("train_loss", "test_loss"))
            losses = [interval(part["train_loss"].to_numpy()) for part in (base, found)]
            against = verdict(own, best[reference], best[arm], "cpu_seconds")
            rates = ", ".join(described(best[each]) for each in (reference, arm))
            cells = [name.replace("_", " "), arm, rates, *losses, train, test, passed(against)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    """Export or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an experiment's folder, a folder of several, or a CSV file")
    parser.add_argument("target", type=Path, nargs="?", help="the CSV file to write")
    parser.add_argument("--reference", default="baseline", help="the arm to compare with, at its best run of several seeds")
    arguments = parser.parse_args()
    if arguments.target:
        export(arguments.source, arguments.target)
        return
    frame = pd.read_csv(arguments.source)
    if "experiment" in frame:
        print(*pairs(frame, arguments.reference), sep="\n")
        return
    print(*trials(frame), sep="\n")
    seeds = frame.groupby(["arm", "learning_rate"])["seed"].transform("nunique")
    several = final(frame[seeds > 1])
    best = best_runs(several)
    if arguments.reference not in best:
        raise SystemExit(
            f"--reference {arguments.reference} is not allowed; allowed: one of {sorted(best)}, which ran with several seeds."
        )
    print("", *comparison(frame, best[arguments.reference]), sep="\n")


if __name__ == "__main__":
    main()
