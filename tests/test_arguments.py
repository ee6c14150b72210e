import dataclasses
import json

import pytest
import torch
import yaml
from transformers import HfArgumentParser

from hf_teleport import TeleportArguments, TeleportConfig, TeleportTrainingArguments


def parse(*words):
    (arguments,) = HfArgumentParser(TeleportTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", *words])
    return arguments.teleport_config()


def test_every_setting_is_an_argument_with_the_same_default_and_help():
    known = {f.name: f for f in dataclasses.fields(TeleportTrainingArguments)}
    for setting in dataclasses.fields(TeleportConfig):
        assert known[f"teleport_{setting.name}"].metadata["help"]
    assert parse() == TeleportConfig()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--teleport_epochs", "5"], {"epochs": 5}),
        (["--teleport_epochs", "0,2"], {"epochs": [0, 2]}),
        (["--teleport_energy_threshold", "0.99"], {"energy_threshold": 0.99}),
        (["--teleport_target_modules", "q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--teleport_target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--teleport_target_modules", r".*\.0\.(q|k)_proj"], {"target_modules": r".*\.0\.(q|k)_proj"}),
        (["--teleport_max_growth", "inf", "--teleport_max_loss_change", "inf"], {"max_growth": None, "max_loss_change": None}),
        (["--teleport_scope", "batch", "--teleport_hessian", "exact"], {"scope": "batch", "hessian": "exact"}),
        (["--teleport_batch_size", "3", "--teleport_grad_norm_cap", "9"], {"batch_size": 3, "grad_norm_cap": 9.0}),
    ],
)
def test_command_line(words, expected):
    assert parse(*words) == TeleportConfig(**expected)


def test_bad_choice_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        parse("--teleport_scope", "everything")
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "epochs", "target_modules"])
def test_a_bad_value_is_said_with_the_name_of_the_argument(name):
    with pytest.raises(ValueError, match=f"^teleport_{name} = .* is not allowed"):
        TeleportTrainingArguments(output_dir="x", **{f"teleport_{name}": {"target_modules": "("}.get(name, "-1")})


def test_a_setting_that_the_method_does_not_read_is_said_with_the_name_of_the_argument():
    with pytest.raises(ValueError, match=r"^teleport_scope = 'batch' is not read by method 'basis'; methods"):
        TeleportTrainingArguments(output_dir="x", teleport_method="basis", teleport_scope="batch")


def test_help_lists_settings_by_the_methods_that_read_them(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    told = capsys.readouterr().out
    order = [
        told.index(f"--teleport_{name} ") for name in ("epochs", "seed", "steps_per_batch", "scope", "hessian", "basis", "budget")
    ]
    assert order == sorted(order)


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--teleport_energy_threshold" in capsys.readouterr().out


def test_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    settings = {"output_dir": "x", "teleport_epochs": [0, 2], "teleport_max_growth": None, "teleport_target_modules": ["query"]}
    file.write_text(yaml.safe_dump(settings))
    (arguments,) = HfArgumentParser(TeleportTrainingArguments).parse_yaml_file(str(file))
    assert arguments.teleport_config() == TeleportConfig(epochs=[0, 2], max_growth=None, target_modules=["query"])


def test_mixes_into_other_arguments():
    @dataclasses.dataclass
    class Other:
        beta: float = 0.1

    @dataclasses.dataclass
    class Both(TeleportArguments, Other):
        pass

    assert Both(beta=0.2, teleport_epochs="3").teleport_config().epochs == 3


def test_arguments_are_saved_and_serialised(tmp_path):
    arguments = TeleportTrainingArguments(output_dir="x", teleport_epochs="0,2")
    torch.save(arguments, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.teleport_config() == arguments.teleport_config()
    assert json.loads(arguments.to_json_string())["teleport_epochs"] == "0,2"
