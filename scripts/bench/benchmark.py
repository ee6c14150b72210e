"""What teleportation costs beside a training step: time and peak memory on several models, as ratios.

    python scripts/bench/benchmark.py --json runs/benchmark.json              # about five minutes on two CPU cores
    python scripts/bench/benchmark.py --models llama-1024x12 --device cuda    # FAMILY-WIDTHxDEPTH, any width and depth
    python scripts/bench/benchmark.py --models --scaling runs/scaling.png     # how an event scales, with a CSV beside the plot

Everything is float32 at tau = 1 on random inputs, of fewer tokens than the width, so that transformers have a null space. The
contestants take turns, one round after the other; a time is the median over rounds, a ratio the median of each round's ratio.

- train_step: forward and backward. update: the same, and a step of AdamW.
- teleport_step: propose a move, copy the weights to undo it, move, loss and gradients there; in the middle of a batch's turn.
  double_backward_step: the same with hessian="exact".
- svd_fit: for each layer a plain float32 SVD of R, as in the paper. gram_fit: a Gram matrix of the smaller side in float64, and
  its eigenvectors. fit: what the package chooses. All from the rows of one batch that are at hand.
- event, batch_scope_event, symmetry_event, level_set_event: whole events of the package by method, guards included.
  paper_event: Algorithm 1 with svd_fit on each batch and double backward, and nothing else: no audit, guard or measurement.
  All batches of an event together are as large as the one of the steps and fits.

Peak memory is what is held at once: weights, AdamW's state, the batch, and all that a contestant allocates. (On the CPU scratch
memory that MKL and oneDNN allocate by themselves is not seen.) The ratio "peak_memory/train_step" is that of a teleport step,
amid the copies, null spaces and graph of its event, to that of a training step with its update.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_contestants import Contestant, Turn, event, fits, paper_event, rows_of_layers
from benchmark_models import Work, build, mlp
from benchmark_race import Course, Measured
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

QUICK = ["mlp-64x2", "gpt2-32x1"]
MODELS = ["mlp-1024x2", "cnn-16x3", "vit-128x4", "gpt2-256x4", "gpt2-512x6", "llama-256x4", "llama-512x6"]
RATIOS = [
    "teleport_step/train_step",
    "teleport_step/double_backward_step",
    "peak_memory/train_step",
    "fit/svd_fit",
    "event/paper_event",
    "event/symmetry_event",
]
# Rows N, width d and rank of matrices that are fitted by themselves.
MATRICES, QUICK_MATRICES = [(8192, 1024, 768), (8192, 1024, 1024), (512, 1024, 512)], [(64, 32, 24), (16, 32, 16)]
# Steps t on a batch, width d, samples n in a batch, hidden layers l, batches b: each varied with the others at BASE.
BASE = {"t": 4, "d": 256, "n": 30, "l": 3, "b": 2}
SCALING = {"t": [2, 4, 8, 16], "d": [128, 256, 512, 1024], "n": [15, 30, 60, 120], "l": [2, 4, 8, 16], "b": [1, 2, 4, 8]}


def of_model(name: str, args: argparse.Namespace) -> dict[str, Measured]:
    """All contestants on one model."""
    # Double backward refuses weights that others have changed, so it gets a model of its own.
    work, untouched = (build(name, args.device, args.quick) for _ in range(2))
    batches = [work.draw(work.samples // args.batches) for _ in range(args.batches)]
    whole = partial(event, work, batches, args.steps)
    steps_and_fits: dict[str, Contestant] = {
        "train_step": lambda: partial(work.train_step, update=False),
        "update": lambda: partial(work.train_step, update=True),
        "teleport_step": partial(Turn, work, "fast"),
        "double_backward_step": partial(Turn, untouched, "exact"),
        **fits(partial(rows_of_layers, work)),
    }
    events: dict[str, Contestant] = {
        "event": whole,
        "batch_scope_event": partial(whole, scope="batch"),
        "paper_event": partial(paper_event, work, batches, args.steps),
        "level_set_event": partial(whole, method="level_set"),
    }
    if name.startswith("mlp"):
        events["symmetry_event"] = partial(whole, method="symmetry")
    course = Course(args.device, args.clock, args.budget, args.rounds)
    found = course.race(steps_and_fits, work.held(), work.restore)
    return found | replace(course, fewest=1).race(events, work.held(), work.restore)


def of_matrix(rows: int, width: int, rank: int, args: argparse.Namespace) -> dict[str, Measured]:
    """The fits to rows (N, d) of a rank."""

    def draw() -> list[Tensor]:
        torch.manual_seed(0)
        return [(torch.randn(rows, rank) @ torch.randn(rank, width)).unsqueeze(0).to(args.device)]

    return Course(args.device, args.clock, args.budget, args.rounds).race(fits(draw))


def ratio(name: str, found: dict[str, Measured]) -> float | None:
    """Of those in RATIOS, by its name; None if a contestant is not there."""
    upper, lower = name.split("/")
    if upper == "peak_memory":
        peaks = [found[each].peak_bytes for each in ("teleport_step", "update") if each in found]
        return peaks[0] / peaks[1] if peaks else None
    if upper not in found or lower not in found:
        return None
    pairs = zip(found[upper].seconds, found[lower].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def entry(name: str, found: dict[str, Measured], args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file says of a model, or of a matrix."""
    return {
        "model": name,
        "ratios": {each: ratio(each, found) for each in RATIOS},
        "seconds": {each: measured.median for each, measured in found.items()},
        "rounds": {each: len(measured.seconds) for each, measured in found.items()},
        "peak_bytes": {each: measured.peak_bytes for each, measured in found.items()},
        "event_steps": {each: measured.steps for each, measured in found.items() if measured.steps is not None},
        "steps": args.steps,
        "batches": args.batches,
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": args.clock.__name__,
        "torch": torch.__version__,
    }


def table_of(name: str, found: dict[str, Measured]) -> Table:
    """Times and peaks of all contestants, and how many times those of a training step they are."""
    table = Table("contestant", title=name)
    for column in ("ms", "train steps", "peak MiB", "of an update's", "rounds", "steps kept"):
        table.add_column(column, justify="right")
    for each, measured in found.items():
        beside = found.get("train_step")
        table.add_row(
            each,
            f"{1e3 * measured.median:.1f}",
            f"{measured.median / beside.median:.2f}" if beside else "",
            f"{measured.peak_bytes / 2**20:.1f}",
            f"{measured.peak_bytes / found['update'].peak_bytes:.2f}" if beside else "",
            str(len(measured.seconds)),
            "" if measured.steps is None else str(measured.steps),
        )
    return table


def summary(entries: list[dict[str, Any]]) -> Table:
    table = Table(*(each.replace("/", " /\n") for each in ("model", *RATIOS)), title="ratios")
    for each in entries:
        table.add_row(each["model"], *("" if r is None else f"{r:.3g}" for r in each["ratios"].values()))
    return table


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of an event of an MLP on images of 16x16, by the null space and by symmetry, with one size varied at a time."""
    rows = []
    for size, values in SCALING.items():
        for value in values[:2] if args.quick else values:
            at = BASE | {size: value}
            torch.manual_seed(0)
            work = Work(*mlp(at["d"], at["l"], at["n"], image_size=16), args.device)
            batches = [work.draw(at["n"]) for _ in range(at["b"])]
            events = {each: partial(event, work, batches, at["t"], method=each) for each in ("null_space", "symmetry")}
            found = Course(args.device, args.clock, args.budget / 10, args.rounds).race(events, work.held(), work.restore)
            for method, measured in found.items():
                rows.append({"size": size, "value": value, "method": method, "seconds": measured.median, "steps": measured.steps})
    return rows


def exponent(values: list[float], seconds: list[float]) -> float:
    """p of `seconds = c values**p`, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> Table:
    """A plot, a CSV beside it, and the exponents as a table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table("varied", *methods, title="exponents of an event's time")
    figure, axes = plt.subplots(1, len(SCALING), figsize=(3.2 * len(SCALING), 3), layout="constrained")
    for axis, size in zip(axes, SCALING, strict=True):
        fitted = []
        for method in methods:
            points = [(row["value"], row["seconds"]) for row in rows if (row["size"], row["method"]) == (size, method)]
            values, seconds = map(list, zip(*points, strict=True))
            fitted.append(f"{exponent(values, seconds):.2f}")
            axis.loglog(values, seconds, marker="o", label=f"{method}, {size}^{fitted[-1]}")
        axis.set(xlabel=size, ylabel="seconds of an event")
        axis.set_xticks(values, map(str, values))
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend()
        table.add_row(size, *fitted)
    figure.savefig(path, dpi=120)
    return table


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--scaling", type=Path, metavar="PNG", help="measure how an event scales in t, d, n, l and b, and plot it here"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="CPU time of the process, steadier where others compute too")
    parser.add_argument("--batches", type=int, default=2, help="in an event (the paper's b)")
    parser.add_argument("--steps", type=int, default=4, help="on each batch of an event (the paper's t)")
    parser.add_argument("--rounds", type=int, default=3, help="of steps and of fits, at least; of events at least one")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds in which there may be more rounds of a race")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args(words)
    if args.cpu_time and args.device.type != "cpu":
        parser.error("--cpu_time is not allowed on a GPU; allowed: with --device cpu.")
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    if args.models is None:
        args.models = QUICK if args.quick else MODELS
    return args


def main() -> None:
    args = parse()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    entries = []
    for name in args.models:
        found = of_model(name, args)
        console.print(table_of(name, found))
        entries.append(entry(name, found, args))
    for rows, width, rank in (QUICK_MATRICES if args.quick else MATRICES) if args.models else []:
        found = of_matrix(rows, width, rank, args)
        name = f"rows {rows}x{width} of rank {rank}"
        console.print(table_of(name, found))
        entries.append(entry(name, found, args))
    if entries:
        console.print(summary(entries))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(entries, indent=1))
    if args.scaling:
        console.print(draw_scaling(scaling(args), args.scaling))


if __name__ == "__main__":
    main()
