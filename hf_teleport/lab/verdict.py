"""Judge whether an arm is better than the baseline. Pure functions on the rows of `results.evaluations`, paired by seed.

The two are compared at equal time or equal samples: the arm is read when it has used as much as the baseline's whole run. A
slower arm is read before its end, and a faster one at its end. Intervals are 95 % (Student's t).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_teleport.reporting.extras import require_extra

CLOCKS = ("seconds", "cpu_seconds")

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference that the seeds show"
REFERENCE, ONE_SEED, NO_BASELINE = "reference", "one seed: no interval", "no verdict: the baseline diverged"

Contestant = tuple[str, float]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % interval.

    Attributes:
        half: half the width. None: there is one seed, or a value is not finite.
        seeds: number of seeds.
    """

    mean: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if not self.half:
            return f"{self.mean:.4g}"
        # With few seeds no more than two digits of the width are meaningful.
        digits = max(0, 1 - math.floor(math.log10(self.half)))
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"

    @property
    def sign(self) -> int:
        """-1 if the whole interval is below zero, 1 if it is above zero, else 0."""
        return 0 if self.half is None or abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


@dataclass(frozen=True)
class Verdict:
    """An arm at a learning rate against the baseline at its best one. Differences are the arm's value minus the baseline's.

    Attributes:
        seeds: number of seeds that both were run with.
        train_loss: the arm's training loss at its end.
        time: time of the arm's whole run, as a multiple of the baseline's.
        time_to_loss: time until the arm reaches the baseline's final training loss, as a multiple of the time that the baseline
            needs for it. Mean over the seeds that reach it. NaN: none does, or the baseline ends no lower than it starts.
        never: number of seeds that never reach it.
        steps_to_loss: as `time_to_loss`, in steps.
        equal_time, equal_samples: the arm's training loss minus the baseline's final one, when the arm has used the baseline's
            time or its samples. The batches of teleports count as samples.
        test_loss, metric: difference of the test loss and of the test set's metric at equal time.
        diverged: number of seeds that end with a loss that is not finite.
        word: 'better', 'worse' or 'no difference that the seeds show', by `equal_time`, or why there is no verdict. For the
            baseline itself it is 'reference'.
    """

    arm: str
    learning_rate: float
    seeds: int
    train_loss: Interval
    time: Interval
    time_to_loss: Interval
    never: int
    equal_time: Interval
    equal_samples: Interval
    test_loss: Interval
    metric: Interval
    diverged: int
    word: str
    steps_to_loss: Interval = Interval(math.nan, None, 0)


def interval(values: Iterable[float]) -> Interval:
    """The mean of values, with its 95 % interval."""
    numbers = np.array(list(values), dtype=float)
    if not len(numbers):
        return Interval(math.nan, None, 0)
    with np.errstate(invalid="ignore"):
        mean = float(numbers.mean())
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        return Interval(mean, None, len(numbers))
    quantile = require_extra("scipy.stats").t.ppf(0.975, len(numbers) - 1)
    return Interval(mean, float(quantile * numbers.std(ddof=1) / len(numbers) ** 0.5), len(numbers))


def value_at(run: Any, column: str, place: float, along: str) -> float:
    """A run's value when it has used this much time or this many samples.

    Args:
        run: its evaluations, by step.
        column: the column of the value.
        place: the time or the number of samples.
        along: the column of `place`.

    Returns:
        The value, by linear interpolation between evaluations. NaN before the first evaluation; the last value after the last;
        infinite next to an infinite value.
    """
    places, values = (run[name].to_numpy(dtype=float) for name in (along, column))
    after = int(np.searchsorted(places, place))
    if after == len(places):
        return float(values[-1])
    if places[after] == place:
        return float(values[after])
    if after == 0:
        return math.nan
    before, behind = values[after - 1], values[after]
    if not np.isfinite([before, behind]).all():
        return float(np.maximum(before, behind))
    share = (place - places[after - 1]) / (places[after] - places[after - 1])
    return float(before + share * (behind - before))


def passage(run: Any, loss: float, along: str) -> float:
    """Where a run first reaches a training loss, by linear interpolation between evaluations. Infinite: never."""
    places, losses = (run[name].to_numpy(dtype=float) for name in (along, "train_loss"))
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return math.inf
    after = reached[0]
    # Before the first evaluation and after an infinite loss there is nothing to interpolate.
    if after == 0 or not np.isfinite(losses[after - 1]):
        return float(places[after])
    share = (losses[after - 1] - loss) / (losses[after - 1] - losses[after])
    return float(places[after - 1] + share * (places[after] - places[after - 1]))


def verdict(frame: Any, reference: Contestant, contestant: Contestant, clock: str = "seconds") -> Verdict:
    """Judge an arm at a learning rate over the seeds.

    Args:
        frame: the result of `results.evaluations`.
        reference: the baseline and its best learning rate.
        contestant: the arm and its learning rate.
        clock: the column of the time, one of `CLOCKS`.

    Raises:
        ValueError: the two have no seed in common.
    """
    bases, runs = _by_seed(frame, reference), _by_seed(frame, contestant)
    seeds = sorted(bases.keys() & runs.keys())
    if not seeds:
        raise ValueError(f"{contestant} and {reference} have no seed in common: run both with the same seeds.")
    pairs = [_compared(runs[seed], bases[seed], clock) for seed in seeds]
    columns = {name: np.array([pair[name] for pair in pairs]) for name in pairs[0]}
    ratios, steps = columns.pop("time_to_loss"), columns.pop("steps_to_loss")
    never = int(np.isinf(ratios).sum())
    ends = [[float(part[seed]["train_loss"].iloc[-1]) for seed in seeds] for part in (runs, bases)]
    diverged, lost = (int((~np.isfinite(losses)).sum()) for losses in ends)
    intervals = {name: interval(values) for name, values in columns.items()}
    return Verdict(
        arm=contestant[0],
        learning_rate=contestant[1],
        seeds=len(seeds),
        train_loss=interval(ends[0]),
        time_to_loss=interval(ratios[~np.isinf(ratios)]),
        never=never,
        diverged=diverged,
        steps_to_loss=interval(steps[~np.isinf(steps)]),
        word=REFERENCE if contestant == reference else _word(intervals["equal_time"], len(seeds), diverged, lost),
        **intervals,
    )


def _by_seed(frame: Any, contestant: Contestant) -> dict[int, Any]:
    arm, rate = contestant
    runs = frame[(frame["arm"] == arm) & (frame["learning_rate"] == rate)]
    return {seed: run.sort_values("step") for seed, run in runs.groupby("seed")}


def _compared(run: Any, base: Any, clock: str) -> dict[str, float]:
    """The numbers of one seed."""
    end = base.iloc[-1]

    def difference(column: str, along: str) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.subtract(value_at(run, column, end[along], along), float(end[column])))

    def to_loss(along: str) -> float:
        own = passage(base, end["train_loss"], along)
        return passage(run, end["train_loss"], along) / own if own else math.nan

    return {
        "time": run[clock].iloc[-1] / end[clock],
        "time_to_loss": to_loss(clock),
        "steps_to_loss": to_loss("step"),
        "equal_time": difference("train_loss", clock),
        "equal_samples": difference("train_loss", "samples"),
        "test_loss": difference("test_loss", clock),
        "metric": difference("metric", clock),
    }


def _word(equal_time: Interval, seeds: int, diverged: int, lost: int) -> str:
    if lost:
        return NO_BASELINE
    if seeds == 1:
        return ONE_SEED
    if diverged:
        return WORSE
    return {-1: BETTER, 0: UNDECIDED, 1: WORSE}[equal_time.sign]
