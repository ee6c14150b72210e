"""The comparisons of a study beside each other, as a table and one CSV file: does a teleport help, and where?

for file in configs/study/*.yaml; do hf-teleport compare $file; done
python scripts/when_report.py runs/study/* --output docs/results/study.csv
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from grid_report import markdown

from hf_teleport.lab.verdict import Interval

HEADER = ["task", "arm", "rate", "training loss", "at equal time", "time to baseline's loss", "test loss", "time", "verdict"]


def cell(interval: dict[str, Any]) -> str:
    return "-" if interval["mean"] is None else str(Interval(**interval))


def lines(name: str, verdicts: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each arm at each of its rates."""
    rows = []
    for verdict in verdicts:
        reference = verdict["word"] == "reference"
        never = f"; never {verdict['never']} of {verdict['seeds']}" if verdict["never"] else ""
        compared = [cell(verdict["equal_time"]), cell(verdict["time_to_loss"]) + never, cell(verdict["test_loss"])]
        rows.append(
            [
                name if reference else "",
                verdict["arm"],
                f"{verdict['learning_rate']:g}",
                cell(verdict["train_loss"]),
                *([""] * 3 if reference else compared),
                "" if reference else cell(verdict["time"]),
                "" if reference else verdict["word"].replace("no difference that the seeds show", "no difference"),
            ]
        )
    return rows


def main(words: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of `hf-teleport compare`; those without a report are left out")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args(words)
    table, frames = [], []
    for folder in args.folders:
        if (folder / "comparison.json").exists():
            table += lines(folder.name, json.loads((folder / "comparison.json").read_text())["verdicts"])
            frames.append(pd.read_csv(folder / "comparison.csv").assign(task=folder.name))
    if not frames:
        raise SystemExit(
            f"none of {[str(folder) for folder in args.folders]} has a comparison.json: run hf-teleport compare first."
        )
    if args.output:
        pd.concat(frames).to_csv(args.output, index=False, float_format="%.6g")
    text = markdown(HEADER, table)
    print(text)
    return text


if __name__ == "__main__":
    main()
