"""Run an experiment for every combination of some settings, and collect the results in one CSV file.

    python scripts/grid.py configs/mnist_mlp_sgd.yaml --output docs/results/mnist_mlp_sgd.csv \
        --grid learning_rate=0.01,0.1 teleport_epochs=0,5 seed=0,1,2

Interrupted, it goes on where it was: a combination that the file holds is not run again.
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

RUN = Path(__file__).parent / "run_image_classification.py"
COLUMNS = ["epoch", "step", "seconds", "cpu_seconds", "teleport_seconds", "train_loss", "test_loss", "test_accuracy"]


def run(config: str, settings: dict[str, str], threads: int) -> list[dict[str, str | float]]:
    """One run in a process of its own; a row for each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history.json"
        overrides = [word for name, value in settings.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(RUN), config, *overrides, "--history", str(history)]
        command += ["--output_dir", folder, "--disable_tqdm", "1"]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return evaluations(json.loads(history.read_text()))


def evaluations(log: list[dict[str, float]]) -> list[dict[str, str | float]]:
    """The evaluations of a run's log; the training loss is that of the training rows, in eval mode."""
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
                entry["eval_test_accuracy"],
            )
            rows.append(dict(zip(COLUMNS, (f"{v:.5g}" for v in values), strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of run_image_classification.py")
    parser.add_argument("--grid", nargs="+", required=True, metavar="NAME=V1,V2", help="settings and their values")
    parser.add_argument("--output", required=True, type=Path, help="CSV file to write or to go on with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    args = parser.parse_args()

    axes = {name: values.split(",") for name, values in (axis.split("=", 1) for axis in args.grid)}
    wanted = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    done = []
    if args.output.exists():
        with args.output.open() as file:
            done = [{name: row[name] for name in axes} for row in csv.DictReader(file)]
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(",".join([*axes, *COLUMNS]) + "\n")
    pending = [settings for settings in wanted if settings not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(run, args.config, settings, args.threads): settings for settings in pending}
        for finished in tqdm(as_completed(runs), total=len(runs), unit="run"):
            with args.output.open("a") as file:
                writer = csv.DictWriter(file, [*axes, *COLUMNS])
                writer.writerows({**runs[finished], **row} for row in finished.result())


if __name__ == "__main__":
    main()
