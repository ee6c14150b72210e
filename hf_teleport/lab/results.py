"""Read an experiment's finished runs into tables, and take means and standard deviations over the seeds."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_teleport.arguments import TeleportTrainingArguments
from hf_teleport.lab.keys import from_yaml
from hf_teleport.lab.runs import ALL_SETTINGS, DONE, HISTORY, SETTINGS
from hf_teleport.methods.basis.method import BasisTurn
from hf_teleport.reporting.extras import require_extra

# Defaults of settings that a file does not name.
_DEFAULTS = {setting.name: setting.default for setting in fields(TeleportTrainingArguments)}

# Metrics of the test set besides its loss. Each kind of data has one.
MEASURES = ("accuracy", "mse", "perplexity")


def evaluations(output: str | Path) -> Any:
    """A `DataFrame` with a row for each evaluation of each finished run.

    Its columns are arm, learning_rate, seed, step, samples, seconds, cpu_seconds, train_loss, test_loss, measure and metric.

    - samples: used so far by training batches and by teleports.
    - seconds, cpu_seconds: time of training so far, with its teleports.
    - train_loss: measured in eval mode, on the rows that the settings name. It is infinite if the run diverged, so that means
      do not skip the run.
    - measure, metric: name and value of the test set's metric.

    Raises:
        FileNotFoundError: there is no finished run.
        ModuleNotFoundError: pandas is not installed.
    """
    pandas = require_extra("pandas")
    rows: list[dict[str, Any]] = []
    for done in sorted(Path(output).glob(f"*/lr*/seed*/{DONE}")):
        settings = json.loads(done.with_name(SETTINGS).read_text())
        run = {name: settings[name] for name in ("arm", "learning_rate", "seed")}
        log = json.loads(done.with_name(HISTORY).read_text())
        samples = _samples(settings, log)
        rows += [run | row | {"samples": samples(row["step"])} for row in _by_step(log)]
    if not rows:
        raise FileNotFoundError(f"there is no finished run in {str(output)!r}: give the output_dir of an experiment.")
    frame = pandas.DataFrame(rows)
    losses = ["train_loss", "test_loss"]
    return frame.assign(**{name: frame[name].fillna(float("inf")) for name in losses})


def _by_step(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations in a run's log. The log has a row for each data set of an evaluation."""
    steps: dict[int, dict[str, Any]] = {}
    for row in log:
        if any(name in row for name in ("eval_train_loss", "eval_test_loss")):
            steps.setdefault(row["step"], {}).update(row)
    found = []
    for step, row in steps.items():
        measure = next((name for name in MEASURES if f"eval_test_{name}" in row), None)
        values = {"train_loss": row.get("eval_train_loss"), "test_loss": row.get("eval_test_loss")}
        values |= {"measure": measure, "metric": row.get(f"eval_test_{measure}")}
        found.append({"step": step, "seconds": row["seconds"], "cpu_seconds": row["cpu_seconds"], **values})
    return found


def _samples(settings: dict[str, Any], log: list[dict[str, Any]]) -> Callable[[int], int]:
    """Returns a function: how many samples a run has used after this many steps.

    A teleport uses the samples of its batches and of the batch held back, and each counts once. A teleport before step N comes
    after an evaluation at step N.
    """

    def value(name: str) -> Any:
        return settings.get(name, _DEFAULTS[name])

    batch = value("per_device_train_batch_size") * settings.get("processes", 1)
    of_a_turn: Any = SimpleNamespace(**{name: value(f"teleport_{name}") for name in ("basis", "track_every")})
    told = value("teleport_method") == "basis" and BasisTurn.is_told(of_a_turn)
    # A basis that follows training's gradients takes two batches an event: one for its check, and one that is held back.
    drawn = ((1 if told else value("teleport_num_batches")) + 1) * (value("teleport_batch_size") or batch)
    event = min(drawn, settings.get("train_rows") or drawn)
    events = {row["step"] for row in log if any(name.startswith("teleport/") for name in row)}
    return lambda step: step * batch * value("gradient_accumulation_steps") + event * sum(at < step for at in events)


def curves(frame: Any) -> Any:
    """Means over the seeds, with a row for each arm, learning rate and step of `evaluations`.

    The columns are arm, learning_rate, step, seconds, cpu_seconds, samples, train_loss, train_loss_sd, test_loss, measure, metric
    and seeds (their number). All numbers are means, except the standard deviation, which has seeds - 1 degrees of freedom.
    """
    groups = frame.groupby(["arm", "learning_rate", "step"], sort=False)
    table = groups.agg(
        seconds=("seconds", "mean"),
        cpu_seconds=("cpu_seconds", "mean"),
        samples=("samples", "mean"),
        train_loss=("train_loss", "mean"),
        train_loss_sd=("train_loss", "std"),
        test_loss=("test_loss", "mean"),
        measure=("measure", "first"),
        metric=("metric", "mean"),
        seeds=("seed", "nunique"),
    )
    return table.reset_index().sort_values(["arm", "learning_rate", "step"], ignore_index=True)


def final(frame: Any) -> Any:
    """The last evaluation of each run."""
    return frame.sort_values("step").groupby(["arm", "learning_rate", "seed"]).tail(1)


def best_rates(frame: Any) -> dict[str, float]:
    """For each arm, the learning rate with the lowest mean of final training losses over the seeds.

    A rate with fewer seeds than another was only tried, and is left out. An arm that diverged at all of its rates is left out.
    """
    best = {arm: best_run(own) for arm, own in frame.groupby("arm")}
    return {str(arm): run[1] for arm, run in best.items() if run is not None}


def best_run(frame: Any) -> tuple[str, float] | None:
    """The arm and rate with the lowest mean of final training losses, among those with the most seeds. None: all diverged."""
    runs = final(frame).groupby(["arm", "learning_rate"])["train_loss"].agg(["mean", "size"])
    whole = runs.loc[(runs["size"] == runs["size"].max()) & (runs["mean"] < float("inf")), "mean"]
    if not len(whole):
        return None
    arm, rate = whole.idxmin()
    return str(arm), float(rate)


def choices(frame: Any, paper_learning_rate: float | None) -> dict[str, dict[str, float]]:
    """For each way to choose a learning rate: the rate of each arm that was run at it."""
    best = {"best learning rate": best_rates(frame)}
    if paper_learning_rate is None:
        return best
    arms = frame.loc[frame["learning_rate"] == paper_learning_rate, "arm"].unique()
    return {"paper-like learning rate": dict.fromkeys(arms, paper_learning_rate), **best}


def paper_rate(output: str | Path) -> float | None:
    """The experiment's `paper_learning_rate`, if it has one."""
    settings = Path(output, ALL_SETTINGS)
    if not settings.exists():
        return None
    rate = from_yaml(settings.read_text(encoding="utf-8"), str(settings)).get("paper_learning_rate")
    return None if rate is None else float(rate)
