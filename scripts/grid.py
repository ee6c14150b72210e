"""Run an experiment for every combination of some settings, and collect the results in one CSV file.

    python scripts/grid.py configs/mnist_mlp_sgd.yaml --output docs/results/mnist_mlp_sgd.csv \\
        --grid learning_rate=0.01,0.1 teleport_epochs=0,5 seed=0,1,2
    python scripts/grid.py configs/ptb_llama.yaml --script run_task.py --output docs/results/ptb.csv --jobs 2 \\
        --arm basis --set teleport_method=basis teleport_steps=10,100 --grid learning_rate=1e-3,3e-3 seed=0,1,2

An arm is a name for what several grids in one file differ in; a setting that another arm does not have is empty in its rows.
An empty value (`teleport_steps=`) is handed on as an empty text, one with blanks (`"teleport_symmetries=stream chain"`) as words.
Interrupted, it goes on where it was: a combination that the file holds is not run again. One grid at a time may write to a file.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

SCRIPTS = Path(__file__).parent
COLUMNS = ["epoch", "step", "seconds", "cpu_seconds", "teleport_seconds", "train_loss", "test_loss", "test_accuracy"]

Row = dict[str, str]


def run(script: str, config: str, settings: Row, threads: int) -> list[Row]:
    """One run in a process of its own; a row for each evaluation.

    Raises:
        RuntimeError: the run failed; the message has the end of what it wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history.json"
        overrides = [word for name, value in settings.items() for word in (f"--{name}", *value.split(" "))]
        command = [sys.executable, str(SCRIPTS / script), config, *overrides, "--history", str(history)]
        command += ["--output_dir", folder, "--disable_tqdm", "1"]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return evaluations(json.loads(history.read_text()))


def evaluations(log: list[dict[str, float]]) -> list[Row]:
    """The evaluations of a run's log; the training loss is that of the training rows, in eval mode. No accuracy: empty."""
    rows, teleport_seconds, train_loss = [], 0.0, float("nan")
    for entry in log:
        teleport_seconds += entry.get("teleport/seconds", 0.0)
        train_loss = entry.get("eval_train_loss", train_loss)
        if "eval_test_loss" in entry:
            values = (
                entry["epoch"],
                entry["step"],
                entry["seconds"],
                entry["cpu_seconds"],
                teleport_seconds,
                train_loss,
                entry["eval_test_loss"],
                entry.get("eval_test_accuracy"),
            )
            rows.append(dict(zip(COLUMNS, ("" if v is None else f"{v:.5g}" for v in values), strict=True)))
    return rows


def open_table(file: Path, settings: list[str]) -> tuple[list[str], list[Row]]:
    """The columns and rows of a CSV file, which is made, or given empty columns for settings that it lacks."""
    rows: list[Row] = []
    present: list[str] = []
    if file.exists():
        with file.open() as old:
            reader = csv.DictReader(old)
            rows, present = list(reader), list(reader.fieldnames or [])
    columns = list(dict.fromkeys([*(name for name in present if name not in COLUMNS), *settings])) + COLUMNS
    if columns == present:
        return columns, rows
    file.parent.mkdir(parents=True, exist_ok=True)
    # Through a second file: an interrupt leaves the old table or the new one.
    new = file.with_suffix(".new")
    with new.open("w") as wider:
        writer = csv.DictWriter(wider, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(file)
    return columns, rows


def assignments(words: list[str], option: str) -> Row:
    """Settings from NAME=VALUE.

    Raises:
        ValueError: a word without an equals sign.
    """
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{option} = {wrong} is not allowed; allowed: NAME=VALUE, such as seed=0.")
    return dict(word.split("=", 1) for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the script")
    parser.add_argument("--script", default="run_image_classification.py", help="which of the scripts beside this one to run")
    parser.add_argument("--arm", help="write this name in a column 'arm'")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all runs; a value may have commas"
    )
    parser.add_argument("--grid", nargs="+", required=True, metavar="NAME=V1,V2", help="settings and their values")
    parser.add_argument("--output", required=True, type=Path, help="CSV file to write or to go on with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    args = parser.parse_args()

    axes = {name: [value] for name, value in assignments(args.set, "--set").items()}
    axes |= {name: values.split(",") for name, values in assignments(args.grid, "--grid").items()}
    arm = {} if args.arm is None else {"arm": args.arm}
    columns, present = open_table(args.output, [*arm, *axes])
    done = [{name: row.get(name, "") for name in [*arm, *axes]} for row in present]
    wanted = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    pending = [settings for settings in wanted if {**arm, **settings} not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(run, args.script, args.config, settings, args.threads): settings for settings in pending}
        try:
            for finished in tqdm(as_completed(runs), total=len(runs), unit="run"):
                rows = [{**arm, **runs[finished], **row} for row in finished.result()]
                with args.output.open("a") as file:
                    csv.DictWriter(file, columns, restval="").writerows(rows)
        except BaseException:
            # What has not started would run on without anyone to write it down.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
