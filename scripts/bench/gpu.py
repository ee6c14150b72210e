"""What a GPU is needed for, in one command of at most ten minutes: a table, and the same as JSON.

    python scripts/bench/gpu.py                        # writes runs/gpu/gpu.json
    python scripts/bench/gpu.py --device cpu --tiny    # the same on small sizes, in a minute, to see that it works

1. Checks: runs in float32, bf16, fp16 with GradScaler, compiled, with NCCL, and under FSDP2 train and teleport (gpu_checks.py).
2. Ratios: what events cost beside a training step (benchmark.py).
3. Race: a Llama of the size of GPT-2 small learns Python by AdamW, by AdamW with the following basis, and by Muon with AdamW.
   They make as many steps as there is time for. Nothing was tuned for this size: the rates are those of a smaller model.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import torch
from gpu_checks import checks, of_ranks, passed
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from hf_teleport.lab.results import evaluations
from hf_teleport.lab.runs import HISTORY, execute
from hf_teleport.lab.settings import plan
from hf_teleport.lab.verdict import passage

MODELS = ["gpt2-512x6", "llama-512x6", "llama-1024x12"]
# Arms, and the learning rate of each for all but embeddings and output head.
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {"teleport_epochs": 0},
    "following": {"teleport_method": "basis"},
    "muon": {"teleport_epochs": 0, "optimizer": "muon+adamw"},
}
RATES = {"adamw": 0.001, "following": 0.001, "muon": 0.004}
RACE = {
    "dataset": "python",
    "package_megabytes": 40,
    "vocabulary_size": 16000,
    "length": 512,
    "model": "llama",
    "train_loss_rows": 64,
    "test_rows": 64,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "embedding_learning_rate": 0.016,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "seeds": 0,
    "arms": ARMS,
    "learning_rates": sorted(set(RATES.values())),
}
GPT2_SMALL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
TINY = {
    "package_megabytes": 0.1,
    "vocabulary_size": 600,
    "length": 32,
    "per_device_train_batch_size": 4,
    "train_loss_rows": 4,
    "test_rows": 4,
}
TINY_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

# Steps of the runs that tell how long a step takes, and the first one that counts; and the most steps of the race.
PROBE_STEPS, WARM, MOST_STEPS = 20, 10, 3000
# Seconds for evaluations and the start of each run.
RESERVE = 60.0


def race(args: argparse.Namespace, seconds: float, output: Path) -> list[dict[str, Any]]:
    """A row for each arm, after as many steps as fit into the seconds."""
    own = TINY if args.tiny else {}
    sizes = (TINY_SIZES if args.tiny else GPT2_SMALL) | {"tie_word_embeddings": False}
    common = RACE | own | {"sizes": sizes, "use_cpu": args.device.type == "cpu", "bf16": args.device.type == "cuda"}
    start = time.perf_counter()
    step_seconds = _step_seconds(common, output / "probe")
    left = seconds - (time.perf_counter() - start) - RESERVE
    steps = PROBE_STEPS if args.tiny else int(min(max(left / sum(step_seconds.values()), PROBE_STEPS), MOST_STEPS))
    ends = evaluations(_runs(common, steps, output / "race"))
    runs = {arm: run.sort_values("step") for arm, run in ends.groupby("arm")}
    base = runs["adamw"].iloc[-1]
    rows = []
    for arm in ARMS:
        end = runs[arm].iloc[-1]
        shares = {name: float(passage(runs[arm], base["train_loss"], name) / base[name]) for name in ("step", "seconds")}
        rows.append(
            {
                "arm": arm,
                "learning_rate": RATES[arm],
                "embedding_learning_rate": common["embedding_learning_rate"],
                "steps": steps,
                "train_loss": float(end["train_loss"]),
                "test_loss": float(end["test_loss"]),
                "seconds": float(end["seconds"]),
                "tokens_per_second": steps * common["per_device_train_batch_size"] * common["length"] / float(end["seconds"]),
                # Of adamw's own; None: never. JSON has no infinity.
                **{f"passes_at_{name}": share if share < float("inf") else None for name, share in shares.items()},
            }
        )
    return rows


def _runs(common: dict[str, Any], steps: int, output: Path) -> Path:
    """The folder of the finished runs, one for each arm at its own rate."""
    of_run = {"max_steps": steps, "warmup_steps": steps // 3, "eval_steps": max(steps // 20, 1), "logging_steps": WARM}
    experiment = plan(common | of_run | {"output_dir": str(output)})
    execute(replace(experiment, runs=[run for run in experiment.runs if run.learning_rate == RATES[run.arm]]))
    return output


def _step_seconds(common: dict[str, Any], output: Path) -> dict[str, float]:
    """Seconds of a step of each arm, without those of the first steps."""
    found = {}
    for file in sorted(_runs(common | {"eval_on_start": False}, PROBE_STEPS, output).glob(f"*/lr*/seed*/{HISTORY}")):
        at = {row["step"]: row["seconds"] for row in json.loads(file.read_text()) if "loss" in row}
        found[file.parents[2].name] = (at[PROBE_STEPS] - at[WARM]) / (PROBE_STEPS - WARM)
    return found


def race_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("arm", title=f"race, {rows[0]['steps']:,} steps")
    for column in ("rate", "of embeddings", "train loss", "test loss", "seconds", "tokens / s", "passes adamw's loss at"):
        shown.add_column(column, justify="right")
    for row in rows:
        shares = row["passes_at_step"], row["passes_at_seconds"]
        passed_at = "never" if shares[0] is None else "{:.0%} of steps, {:.0%} of seconds".format(*shares)
        rates = f"{row['learning_rate']:g}", f"{row['embedding_learning_rate']:g}"
        losses = f"{row['train_loss']:.3f}", f"{row['test_loss']:.3f}"
        shown.add_row(row["arm"], *rates, *losses, f"{row['seconds']:.0f}", f"{row['tokens_per_second']:,.0f}", passed_at)
    return shown


def check_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("check", "", "seconds", "what was found", title="checks")
    for row in rows:
        shown.add_row(row["check"], "passed" if row["passed"] else "FAILED", f"{row['seconds']:.1f}", row["said"])
    return shown


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all together; the race takes what is left")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for gpu.json")
    args = parser.parse_args(words)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not allowed here; allowed: cpu, for torch finds no CUDA device.")
    return args


def main(words: list[str] | None = None) -> int:
    """Returns 1 if a check failed."""
    start, args = time.perf_counter(), parse(words)
    logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    on_gpu = args.device.type == "cuda"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu", "torch": torch.__version__}

    def keep(part: str, rows: list[dict[str, Any]], table: Table) -> None:
        """Each part at once: a run that is cut short leaves what it has."""
        found[part] = rows
        (args.output / "gpu.json").write_text(json.dumps(found | {"seconds": time.perf_counter() - start}, indent=1))
        console.print(table)

    made = [passed(name, check) for name, check in checks(args.device).items()] + of_ranks(args.device)
    keep("checks", made, check_table(made))
    quick = ["--quick"] if args.tiny else ["--models", *MODELS]
    of_benchmark = benchmark.parse([*quick, "--device", str(args.device), "--budget", "1", "--rounds", "1" if args.tiny else "3"])
    entries = [benchmark.entry(each, benchmark.of_model(each, of_benchmark), of_benchmark) for each in of_benchmark.models]
    keep("ratios", entries, benchmark.summary(entries))
    folder = Path(tempfile.mkdtemp(dir=args.output))
    try:
        rows = race(args, 60 * args.minutes - (time.perf_counter() - start), folder)
    finally:
        shutil.rmtree(folder)
    keep("race", rows, race_table(rows))
    return 0 if all(row["passed"] for row in made) else 1


if __name__ == "__main__":
    sys.exit(main())
