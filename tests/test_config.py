import html
import json
import re

import numpy as np
import pytest

from hf_teleport import TeleportConfig
from hf_teleport.html import render
from hf_teleport.journal import JOURNAL


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"energy_threshold": 0}, "energy_threshold = 0"),
        ({"energy_threshold": 1.5}, "allowed: above 0, at most 1, or None"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": "fast"}, "a finite number"),
        ({"num_batches": 0}, "num_batches"),
        ({"steps_per_batch": 0}, "steps_per_batch"),
        ({"batch_size": 0}, "batch_size = 0 is not allowed; allowed: 1 or more, or None"),
        ({"grad_norm_cap": 0}, "grad_norm_cap = 0.0 is not allowed; allowed: a positive number, or None"),
        ({"max_growth": 1}, "above 1"),
        ({"max_loss_change": -0.1}, "max_loss_change"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"scope": "all"}, "'joint', 'batch'"),
        ({"hessian": "none"}, "'fast', 'exact'"),
        ({"objective": "luck"}, "grad_norm"),
        ({"method": "magic"}, "null_space"),
        ({"step_size": "big"}, "relative"),
        ({"num_batches": 2.5}, "whole number"),
        ({"seed": None}, "whole number"),
        ({"learning_rate": None}, "a finite number"),
        ({"epochs": [0.5]}, "epochs = [0.5]"),
        ({"target_modules": 3}, "a list of names"),
        ({"exclude_modules": "(unclosed"}, "as a regular expression it fails"),
        ({"epochs": "often"}, "epochs = 'often'"),
        ({"epochs": -1}, "epochs = -1"),
        ({"epochs": [0, -2]}, "list of epoch indices"),
        (
            {"steps": "soon"},
            "steps = 'soon' is not allowed; allowed: optimizer steps from 0, for instance '10,100', or 'doubling'",
        ),
        ({"steps": [-1]}, "optimizer steps from 0"),
        ({"steps": 3.5}, "steps = 3.5"),
        ({"symmetries": None}, "a list of words"),
        ({"every_steps": 0}, "every_steps = 0"),
        ({"basis": "best"}, "'gradient', 'predicted_decrease', 'activation', 'random', 'identity'"),
        ({"symmetries": ["stream", "time"]}, "some of stream, value_output"),
        ({"symmetries": []}, "some of stream"),
        ({"second_moment": "centred"}, "'factors', 'measure', 'turn', 'keep'"),
        ({"optimizer_state": "turn"}, "'keep', 'reset'"),
        ({"blocking_gains": "cut"}, "'leave', 'hold', 'round'"),
        ({"min_misalignment": 2}, "0 to 1"),
        ({"track_decay": 1}, "0 to below 1"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(settings, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        TeleportConfig(**settings)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [(5, 5), ("5", 5), ("0,2,4", [0, 2, 4]), ("[1]", [1]), ("[]", []), ([0, 3], [0, 3]), ((1, 2), [1, 2]), (0, 0)],
)
def test_epochs_as_count_or_list(given, parsed):
    assert TeleportConfig(epochs=given).epochs == parsed


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (None, None),
        ("", None),
        ("10", [10]),
        (10, [10]),
        ("100,10", [10, 100]),
        ("[3]", [3]),
        ("2,5,", [2, 5]),
        ("None", None),
        ((7, 7, 2), [2, 7]),
        ([], []),
    ],
)
def test_steps_as_text_or_numbers(given, parsed):
    assert TeleportConfig(steps=given).steps == parsed


@pytest.mark.parametrize("given", ["stream,chain", "stream, chain", ["stream,chain"], ("stream", "chain")])
def test_symmetries_as_words_or_a_list(given):
    assert TeleportConfig(symmetries=given).symmetries == ["stream", "chain"]


def test_each_method_of_a_combination_has_its_own_settings():
    config = TeleportConfig(method="null_space+basis", num_batches=3)
    assert [(c.method, c.num_batches) for c in config.each_method()] == [("null_space", 3), ("basis", 3)]
    assert TeleportConfig(method="basis").each_method() == [TeleportConfig(method="basis")]


@pytest.mark.parametrize(
    ("method", "setting", "readers"),
    [
        ("basis", {"scope": "batch"}, "null_space, level_set"),
        ("basis", {"steps_per_batch": 4}, "null_space, level_set, symmetry"),
        ("symmetry", {"scope": "batch"}, "null_space, level_set"),
        ("level_set", {"hessian": "exact"}, "null_space"),
        ("null_space", {"symmetries": ["stream"]}, "basis"),
        ("null_space+basis", {"budget": 0.1}, "auto"),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(method, setting, readers):
    ((name, value),) = setting.items()
    said = (
        f"{name} = {value!r} is not read by method {method!r}; methods that read it: {readers}. "
        "Leave it out, or choose one of these."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        TeleportConfig(method=method, **setting)
    for other in readers.split(", "):
        assert getattr(TeleportConfig(method=other, **setting), name) == value
    default = getattr(TeleportConfig(), name)
    assert getattr(TeleportConfig(method=method, **{name: default}), name) == default


@pytest.mark.parametrize("method", ["auto", "null_space+basis"])
def test_methods_that_come_to_others_read_what_those_read(method):
    config = TeleportConfig(method=method, scope="batch", hessian="exact", second_moment="measure", num_batches=3)
    null_space, basis = (config.for_method(name) for name in ("null_space", "basis"))
    assert null_space == TeleportConfig(method="null_space", scope="batch", hessian="exact", num_batches=3)
    assert basis == TeleportConfig(method="basis", second_moment="measure", num_batches=3)
    assert config.method == method


def test_for_a_method_that_there_is_not():
    with pytest.raises(ValueError, match="method = 'magic' is not allowed"):
        TeleportConfig().for_method("magic")


def test_a_report_of_a_run_with_settings_that_are_refused_today(tmp_path):
    """`hf-teleport report` shows what an older run was given, and does not judge it."""
    config = {**TeleportConfig(method="basis").to_dict(), "scope": "batch", "hessian": "exact"}
    about = {"model": "M", "versions": {}, "config": config, "settled": None, "training": {}}
    event = {"step": 0, "seconds": 0.1, "method": "basis", "loss_before": 1.0, "loss_after": 1.0}
    (tmp_path / JOURNAL).write_text(json.dumps({**about, "events": [event]}))
    text = html.unescape(render(tmp_path))
    assert "method='basis'" in text
    assert "scope='batch'" in text


def test_yaml_numbers_written_without_a_dot_are_numbers():
    assert TeleportConfig(learning_rate="1e-3").learning_rate == 1e-3


def test_round_trip_through_a_dict():
    config = TeleportConfig(epochs=[0, 2], energy_threshold=0.99, target_modules=["q_proj"])
    assert TeleportConfig.from_dict(config.to_dict()) == config


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'energy_threshold'"):
        TeleportConfig.from_dict({"energy_treshold": 1})
    with pytest.raises(ValueError, match="did you mean 'method'"):
        TeleportConfig.from_dict({"teleport_method": "basis"})


def test_numbers_as_text_and_numpy_numbers():
    config = TeleportConfig(num_batches="8", warmup_steps="40", epochs=np.int64(3), seed=np.int64(2), max_growth="inf")
    assert (config.num_batches, config.warmup_steps, config.epochs, config.seed) == (8, 40, 3, 2)
    assert config.max_growth is None
