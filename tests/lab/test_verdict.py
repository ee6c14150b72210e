"""Verdicts on synthetic evaluations whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hf_teleport.lab.verdict import (
    BETTER,
    NO_BASELINE,
    ONE_SEED,
    REFERENCE,
    UNDECIDED,
    WORSE,
    Interval,
    interval,
    passage,
    value_at,
    verdict,
)

BASE, ARM = ("baseline", 0.1), ("arm", 0.1)


def run(contestant, seed, losses, seconds=10.0, samples=10, start=0, metrics=None):
    """Evaluations at steps 0, 1, ...: so many seconds and samples a step, after those of a teleport at the start."""
    arm, rate = contestant
    steps = np.arange(len(losses))
    return pd.DataFrame(
        {
            "arm": arm,
            "learning_rate": rate,
            "seed": seed,
            "step": steps,
            "seconds": steps * seconds,
            "cpu_seconds": steps * seconds / 2,
            "samples": steps * samples + np.where(steps > 0, start, 0),
            "train_loss": losses,
            "test_loss": np.array(losses) + 1,
            "measure": "accuracy",
            "metric": metrics if metrics is not None else 1 - np.array(losses) / 10,
        }
    )


def frame(*runs):
    return pd.concat(runs, ignore_index=True)


def shifted(by, **settings):
    """A frame with a baseline of three seeds, and an arm that ends so much higher with each."""
    bases = [run(BASE, seed, [9.0, 2.0 + seed]) for seed in range(3)]
    return frame(*bases, *[run(ARM, seed, [9.0, 2.0 + seed + b], **settings) for seed, b in enumerate(by)])


# --- one run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "expected"), [(0, 4.0), (5, 3.5), (10, 3.0), (15, 2.0), (20, 1.0), (99, 1.0)])
def test_values_lie_on_straight_lines_and_stay_at_the_end(place, expected):
    assert value_at(run(ARM, 0, [4.0, 3.0, 1.0]), "train_loss", place, "seconds") == expected


def test_before_the_first_evaluation_nothing_is_known_and_beside_infinity_there_is_no_line():
    late = run(ARM, 0, [4.0, 3.0]).assign(seconds=[5.0, 10.0])
    assert math.isnan(value_at(late, "train_loss", 4, "seconds"))
    assert value_at(run(ARM, 0, [4.0, math.inf]), "train_loss", 5, "seconds") == math.inf
    assert value_at(run(ARM, 0, [4.0, math.inf, 3.0]), "train_loss", 20, "seconds") == 3.0


@pytest.mark.parametrize(("loss", "expected"), [(4.0, 0), (3.5, 5), (2.5, 12.5), (2.0, 15), (1.0, 20), (0.5, math.inf)])
def test_passage(loss, expected):
    # The first time counts, whatever comes later.
    assert passage(run(ARM, 0, [4.0, 3.0, 1.0, 2.0]), loss, "seconds") == expected


def test_from_an_infinite_loss_the_passage_is_at_the_next_evaluation():
    assert passage(run(ARM, 0, [math.inf, 1.0]), 2.0, "seconds") == 10


# --- intervals ------------------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.seeds == 3


@pytest.mark.parametrize("values", [[1.0], [1.0, math.inf], []])
def test_without_two_finite_values_there_is_none(values):
    found = interval(values)
    assert found.half is None
    assert found.sign == 0


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Interval(5.21764, 0.0191, 3), "5.218 ± 0.019"),
        (Interval(-0.4618, 1.04, 3), "-0.5 ± 1.0"),
        (Interval(123.4, 45.6, 3), "123 ± 46"),
        (Interval(0.81234, None, 1), "0.8123"),
        (Interval(1.0, 0.0, 3), "1"),
        (Interval(math.nan, None, 0), "-"),
        (Interval(math.inf, None, 3), "inf"),
    ],
)
def test_an_interval_is_written_with_the_digits_that_it_has(found, text):
    assert str(found) == text


# --- verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "word"),
    [
        ([-0.5, -0.6, -0.55], BETTER),
        ([0.5, 0.6, 0.55], WORSE),
        ([-0.5, 0.6, 0.0], UNDECIDED),
        ([0.0, 0.0, 0.0], UNDECIDED),
        ([-0.5], ONE_SEED),
        ([-0.5, math.inf, -0.5], WORSE),
    ],
)
def test_the_word_says_whether_the_interval_excludes_zero(by, word):
    found = verdict(shifted(by), BASE, ARM)
    assert found.word == word
    assert found.seeds == len(by)
    assert found.equal_time.mean == pytest.approx(np.mean(by))
    assert found.diverged == sum(map(math.isinf, by))


def test_pairs_are_of_one_seed():
    """The baseline's seeds differ by far more than the arm gains with each."""
    found = verdict(shifted([-0.1, -0.11, -0.09]), BASE, ARM)
    assert found.equal_time.half == pytest.approx(interval([-0.1, -0.11, -0.09]).half)
    assert found.word == BETTER


def test_a_slower_arm_is_read_before_its_end():
    """Lower at its end, it is higher when the baseline's time is over; test loss and metric are read there too."""
    runs = [run(BASE, 0, [4.0, 2.0]), run(ARM, 0, [4.0, 1.0], seconds=40.0)]
    found = verdict(frame(*runs), BASE, ARM)
    assert found.equal_time.mean == pytest.approx(3.25 - 2.0)
    assert found.test_loss.mean == pytest.approx(4.25 - 3.0)
    assert found.metric.mean == pytest.approx(0.675 - 0.8)
    assert found.equal_samples.mean == pytest.approx(1.0 - 2.0)
    assert found.time.mean == 4
    assert found.train_loss.mean == 1.0


def test_a_faster_arm_is_read_at_its_end():
    found = verdict(frame(run(BASE, 0, [4.0, 2.0]), run(ARM, 0, [4.0, 3.0], seconds=5.0)), BASE, ARM)
    assert found.equal_time.mean == 1.0
    assert found.time.mean == 0.5


def test_samples_of_a_teleport_are_charged():
    """Ten samples a step and ten for the teleport: at the baseline's twenty the arm has made one step of its two."""
    found = verdict(frame(run(BASE, 0, [4.0, 3.0, 2.0]), run(ARM, 0, [4.0, 2.5, 1.0], start=10)), BASE, ARM)
    assert found.equal_samples.mean == pytest.approx(2.5 - 2.0)
    assert found.equal_time.mean == -1.0


def test_the_clock_is_a_choice():
    slow = run(ARM, 0, [4.0, 2.0], seconds=20.0).assign(cpu_seconds=[0.0, 5.0])
    runs = frame(run(BASE, 0, [4.0, 2.0]), slow)
    assert verdict(runs, BASE, ARM).equal_time.mean == 1.0
    assert verdict(runs, BASE, ARM, "cpu_seconds").equal_time.mean == 0.0
    assert verdict(runs, BASE, ARM, "cpu_seconds").time.mean == 1.0


def test_time_to_the_baselines_loss_in_its_own_time():
    """The baseline passes its final loss of 2 after 20 of its 40 seconds already, the arm after 10, 30 and never."""
    bases = [run(BASE, seed, [4.0, 3.0, 2.0, 1.0, 2.0]) for seed in range(3)]
    arms = [[4.0, 2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0, 4.0]]
    found = verdict(frame(*bases, *[run(ARM, seed, losses) for seed, losses in enumerate(arms)]), BASE, ARM)
    assert (found.never, found.seeds) == (1, 3)
    assert found.time_to_loss == interval([0.5, 1.5])


def test_when_no_seed_gets_there_there_is_no_time():
    found = verdict(shifted([1.0, 1.0, 1.0]), BASE, ARM)
    assert (found.never, found.time_to_loss.seeds) == (3, 0)
    assert math.isnan(found.time_to_loss.mean)


def test_a_baseline_that_ends_no_lower_than_it_starts_gives_no_time():
    found = verdict(frame(run(BASE, 0, [2.0, 2.0]), run(ARM, 0, [2.0, 1.0])), BASE, ARM)
    assert found.never == 0
    assert math.isnan(found.time_to_loss.mean)


def test_a_baseline_that_diverged_is_no_reference():
    runs = [run(BASE, 0, [4.0, math.inf]), run(BASE, 1, [4.0, 2.0]), *[run(ARM, seed, [4.0, 1.0]) for seed in range(2)]]
    assert verdict(frame(*runs), BASE, ARM).word == NO_BASELINE


def test_the_baseline_itself():
    found = verdict(shifted([-1.0]), BASE, BASE)
    assert found.word == REFERENCE
    assert found.train_loss == interval([2.0, 3.0, 4.0])
    assert (found.time, found.time_to_loss, found.equal_time) == (interval([1.0] * 3), interval([1.0] * 3), interval([0.0] * 3))


def test_only_seeds_and_rates_that_both_have_count():
    other = run(("arm", 0.3), 0, [4.0, 9.0])
    runs = frame(shifted([-1.0, -1.0]), other, run(ARM, 7, [4.0, 9.0]))
    assert verdict(runs, BASE, ARM).seeds == 2
    with pytest.raises(ValueError, match="no seed in common"):
        verdict(frame(run(BASE, 0, [1.0]), run(ARM, 1, [1.0])), BASE, ARM)
