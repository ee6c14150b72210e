"""Equal tuning: where the search goes, what it keeps, and a comparison of tuned arms on real rows."""

import json
import math

import pytest
import torch
from lab.test_compare import config, mnist, needs_data, planned  # noqa: F401
from torch import nn

from hf_teleport.cli import main
from hf_teleport.lab.compare import compare
from hf_teleport.lab.optimizers import CPUMuon
from hf_teleport.lab.report import RECORD
from hf_teleport.lab.results import evaluations
from hf_teleport.lab.tuning import coordinate_search

AXES = {"learning_rate": [0.001, 0.002, 0.004], "adam_beta2": [0.95, 0.999], "weight_decay": [0.0, 0.1]}
START = {"learning_rate": 0.002, "adam_beta2": 0.999, "weight_decay": 0.0}


def bowl(rate, beta2=0.95, decay=0.1, width=1.0):
    """A loss with its minimum there, by octaves of the learning rate, and the points that were asked for."""
    asked = []

    def loss(point):
        asked.append(point)
        octaves = math.log2(point["learning_rate"] / rate)
        return 5 + width * octaves**2 + 0.1 * (point["adam_beta2"] != beta2) + 0.1 * (point["weight_decay"] != decay)

    return loss, asked


@pytest.mark.parametrize("rate", [0.00025, 0.001, 0.002, 0.004, 0.032])
def test_the_search_ends_at_the_minimum_beyond_the_ends_of_a_list_of_rates_too(rate):
    loss, asked = bowl(rate)
    search = coordinate_search(loss, AXES, START, trials=30)
    assert search.best == {"learning_rate": pytest.approx(rate), "adam_beta2": 0.95, "weight_decay": 0.1}
    assert (search.loss, search.ended) == (pytest.approx(5), True)
    # Nothing is tried twice.
    assert len(asked) == len(search.losses) == len({tuple(point.values()) for point in asked})
    # Both neighbours of the best rate were tried, so it is inside.
    rates = sorted(point["learning_rate"] for point in asked)
    assert rates[0] < rate * 0.99
    assert rates[-1] > rate * 1.01


def test_trials_are_a_limit_and_running_out_is_said():
    loss, asked = bowl(0.064)
    search = coordinate_search(loss, AXES, START, trials=4)
    assert (len(asked), search.ended) == (4, False)
    assert "the trials ran out" in str(search)
    assert search.best["learning_rate"] == max(point["learning_rate"] for point in asked)


def test_trials_that_are_left_go_along_the_rates_within_two_per_cent():
    loss, _ = bowl(0.002, width=0.02)
    search = coordinate_search(loss, AXES, START, trials=30)
    # 5 + 0.02 x octaves^2 is within 2 % of 5 up to 2 octaves away.
    assert search.good_rates == pytest.approx([0.0005, 0.001, 0.002, 0.004, 0.008])
    assert "from 0.0005 to 0.008 end within 2% of it" in str(search)


def test_a_run_that_diverged_is_never_best():
    search = coordinate_search(lambda p: math.inf if p["learning_rate"] > 0.002 else 1.0, AXES, START, trials=30)
    assert search.best == START


def test_settings_other_than_rates_stay_within_their_list():
    values = []
    coordinate_search(lambda p: values.append(p["weight_decay"]) or -p["weight_decay"], AXES, START, trials=30)
    assert set(values) == {0.0, 0.1}


TUNE = {
    "tune": {"learning_rate": [0.1, 0.2], "weight_decay": [0.0, 0.01]},
    "learning_rates": [0.1],
    "weight_decay": 0.0,
    "trials": 3,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 0}, r"trials = 0 is not allowed; allowed: a whole number from 1"),
        ({"tune": [0.1]}, r"tune = \[0.1\] is not allowed; allowed: a mapping"),
        ({"tune": {"learning_rate": [0.2, 0.1]}}, r"tune.learning_rate = .* in ascending order"),
        ({"tune": {"learning_rate": [-0.1, 0.1]}}, r"tune.learning_rate = .* not allowed"),
        ({"tune": {"adam_beta2": [0.9, 0.99]}}, r"adam_beta2 = None is where the search starts; allowed: one of"),
        ({"weight_decay": 0.5}, r"weight_decay = 0.5 is where the search starts"),
        ({"learning_rates": [0.1, 0.2]}, r"learning_rates = \[0.1, 0.2\] is not allowed with `tune`"),
    ],
)
def test_wrong_settings_are_named_before_any_work(config, settings, message, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        planned(config(**{**TUNE, **settings}))
    assert not (tmp_path / "out").exists()


@needs_data
def test_every_arm_is_compared_at_its_own_best_settings(config, mnist, tmp_path, capsys):  # noqa: F811
    moving = {"teleport_method": "null_space", "teleport_epochs": 1, "teleport_steps_per_batch": 2, "weight_decay": 0.0}
    arms = {"baseline": {"teleport_epochs": 0}, "null_space": moving}
    file = config(folder=str(mnist), arms=arms, controls=["random_move"], **TUNE)
    assert main(["compare", str(file)]) == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    told = dict(remark.split(": ", 1) for remark in record["remarks"])
    assert set(told) == {"baseline", "null_space"}
    # An arm keeps a setting that it gives itself.
    assert "weight_decay" in told["baseline"]
    assert "weight_decay" not in told["null_space"]
    assert {v["arm"] for v in record["verdicts"]} == {"baseline", "null_space", "null_space.random_move"}
    assert all(v["seeds"] == 2 for v in record["verdicts"])

    # What is chosen has the lowest loss of the first seed's trials, and is what the comparison shows.
    comparison = compare(planned(file))
    everything = evaluations(tmp_path / "out")
    ends = everything[(everything["step"] == 6) & (everything["seed"] == 0)]
    trials = ends[ends["arm"].str.match(r"baseline(\+|$)")]
    assert len(trials) == 3
    frame = comparison.frame
    chosen = frame[(frame["arm"] == "baseline") & (frame["step"] == 6) & (frame["seed"] == 0)]
    assert float(chosen["train_loss"].iloc[0]) == trials["train_loss"].min()
    rates = comparison.choices["each arm's best settings"]
    assert rates["null_space.random_move"] == rates["null_space"]
    assert "best at learning_rate" in capsys.readouterr().out


def test_muon_on_a_cpu_steps_as_torchs_does_but_for_bfloat16():
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 16), torch.randn(24, 16)
    moved = []
    for kind in (torch.optim.Muon, CPUMuon):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        kind([weight], lr=0.1, weight_decay=0.0).step()
        moved.append(weight.detach() - start)
    assert (moved[0] - moved[1]).norm() < 0.03 * moved[0].norm()
    assert moved[1].ne(moved[0]).any()
