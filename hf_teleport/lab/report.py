"""The results of a comparison as files, as a table, and as sentences."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_teleport.lab.compare import Comparison
from hf_teleport.lab.plot import figure
from hf_teleport.lab.results import curves
from hf_teleport.lab.verdict import BETTER, NO_BASELINE, REFERENCE, Interval, Verdict
from hf_teleport.reporting.extras import require_extra

NUMBERS, RECORD, FIGURE = "comparison.csv", "comparison.json", "comparison.png"

_CLOCK_NAMES = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}


def write(comparison: Comparison) -> list[Path]:
    """Write numbers, verdicts and picture into the output folder. Returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib or pandas is not installed.
    """
    folder, clock = comparison.protocol.whole.output, comparison.protocol.clock
    paths = [folder / name for name in (NUMBERS, RECORD, FIGURE)]
    numbers(comparison).to_csv(paths[0], index=False)
    paths[1].write_text(json.dumps(record(comparison), indent=1))
    along = {"step": "step", clock: f"{_CLOCK_NAMES[clock]}, teleports included", "samples": "samples, teleports included"}
    figure(curves(comparison.frame), comparison.choices, along).savefig(paths[2], dpi=110)
    return paths


def numbers(comparison: Comparison) -> Any:
    """A `DataFrame` with a row for each `Verdict`. Half the width of an interval is in the column `..._half`."""
    rows = []
    for verdict in comparison.verdicts:
        row: dict[str, Any] = {}
        for name, value in vars(verdict).items():
            row |= {name: value.mean, f"{name}_half": value.half} if isinstance(value, Interval) else {name: value}
        rows.append(row)
    return require_extra("pandas").DataFrame(rows)


def record(comparison: Comparison) -> dict[str, Any]:
    """The whole outcome as plain values. A number that is not finite becomes None."""
    made = comparison.protocol
    return {
        "clock": made.clock,
        "learning_rates": made.rates,
        "seeds": made.seeds,
        "best_learning_rates": comparison.best,
        "remarks": comparison.remarks,
        "verdicts": [_plain(asdict(verdict)) for verdict in comparison.verdicts],
        "sentences": sentences(comparison),
    }


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a `record`. A number that was not finite is NaN."""
    return [Verdict(**{name: _interval(value) for name, value in row.items()}) for row in found["verdicts"]]


def _interval(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return Interval(math.nan if value["mean"] is None else value["mean"], value["half"], value["seeds"])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(comparison: Comparison) -> Any:
    """A rich table of differences from the baseline at its best learning rate: mean ± half the 95 % interval over the seeds."""
    from rich import box
    from rich.table import Table

    made, frame = comparison.protocol, comparison.frame
    measure = " or ".join(frame["measure"].dropna().unique())
    shown = Table(
        title=f"{made.whole.output.name}: arms minus the baseline at its best learning rate, by {_CLOCK_NAMES[made.clock]}; "
        f"mean ± 95 % interval over {len(made.seeds)} seeds",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in columns(measure):
        shown.add_column(column, no_wrap=column == "arm")
    for verdict in comparison.verdicts:
        shown.add_row(*cells(verdict))
    return shown


def columns(measure: str = "metric") -> list[str]:
    """The names of the columns of `cells`.

    Args:
        measure: the name of the test set's metric.
    """
    times = ["final loss", "time", "steps to its loss", "time to its loss", "at equal time", "at equal samples"]
    return ["arm", "rate", *times, "test loss", f"test {measure}", "verdict"]


def cells(verdict: Verdict) -> list[str]:
    """A verdict as a row of a table. The differences are blank for the baseline itself."""
    differences = (verdict.equal_time, verdict.equal_samples, verdict.test_loss, verdict.metric)
    compared = [
        _passing(verdict, "steps_to_loss"),
        _passing(verdict, "time_to_loss"),
        *(_signed(difference) for difference in differences),
    ]
    return [
        verdict.arm,
        f"{verdict.learning_rate:g}",
        str(verdict.train_loss),
        f"x {verdict.time}",
        *([""] * len(compared) if verdict.word == REFERENCE else compared),
        verdict.word.partition(" that ")[0],
    ]


def _passing(verdict: Verdict, name: str) -> str:
    """When an arm reaches the baseline's final training loss, as a multiple of the baseline's own time or steps."""
    reached = getattr(verdict, name)
    never = f"never {verdict.never} of {verdict.seeds}"
    if verdict.never == verdict.seeds:
        return never
    return f"x {reached}; {never}" if verdict.never else f"x {reached}"


def _signed(difference: Interval) -> str:
    text = str(difference)
    return f"+{text}" if difference.mean > 0 else text


def sentences(comparison: Comparison) -> list[str]:
    """The verdicts as sentences, followed by doubts that controls or the grid of learning rates raise."""
    own = {verdict.arm: verdict for verdict in comparison.verdicts if verdict.word == BETTER}
    doubts = [
        f"{arm} is better, but so is its control {control}: the gain may not be the teleport's."
        for arm in comparison.protocol.arms
        for control in own
        if arm in own and (control == "warmup" or control.startswith(f"{arm}."))
    ]
    judged = [verdict for verdict in comparison.verdicts if verdict.word != REFERENCE]
    return [_sentence(verdict, comparison.protocol.clock) for verdict in judged] + doubts + comparison.remarks


def _sentence(verdict: Verdict, clock: str) -> str:
    said = f"{verdict.arm} at {verdict.learning_rate:g}: {verdict.word}"
    if verdict.diverged:
        return f"{said}; it diverged with {verdict.diverged} of {verdict.seeds} seeds."
    if verdict.word == NO_BASELINE:
        return f"{said} with one of the seeds or more."
    reached = f"in {verdict.time_to_loss} times its own time" if verdict.never < verdict.seeds else "by no seed"
    if math.isnan(verdict.time_to_loss.mean) and verdict.never < verdict.seeds:
        reached = "at its start already"
    missed = f", and never with {verdict.never} of {verdict.seeds} seeds" if 0 < verdict.never < verdict.seeds else ""
    return (
        f"{said}. Training loss {_signed(verdict.equal_time)} at equal {_CLOCK_NAMES[clock]}, "
        f"{_signed(verdict.equal_samples)} at equal samples. The baseline's final loss is reached {reached}{missed}."
    )
