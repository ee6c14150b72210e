"""What is wrong with the YAML file of `experiment`, `compare` or `train` is said before any work."""

import pytest

from hf_teleport.cli import main

EXPERIMENT = """
dataset: digits
kind: image
model: mlp
learning_rates: [0.1]
seeds: [0]
eval_strategy: epoch
"""


ARMS = "arms: {baseline: {teleport_epochs: 0}, teleport: {}}\n"


@pytest.mark.parametrize("command", [["experiment"], ["compare"], ["train", "glue"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_train_epoch: 3", "unknown key 'num_train_epoch'"),
        ("3: 4", "unknown key 3"),
        ("learning_rates:\n\t- 1", "line 2, column 1"),
        ("seeds:\n\t- 1", "YAML needs blanks instead of tabs"),
        ("", "holds nothing, which is not allowed; allowed: a YAML file of keys and values"),
        ("- a", "holds a list"),
        ("base: 3", "base = [3]"),
        ("base: nowhere.yaml", "there is no file"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("seeds: 1\nseeds: 2", "wrong.yaml, line 2: key 'seeds' is given twice in one mapping, first in line 1; remove one"),
        ("sizes:\n  a: 1\n  b: 2\n  a: 1", "wrong.yaml, line 4: key 'a' is given twice in one mapping, first in line 2"),
    ],
)
def test_a_file_that_cannot_be_is_named_before_any_work(command, text, said, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([*command, str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path) in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_train_epochs: [1, 2]", "num_train_epochs = [1, 2] is not allowed; allowed: a number"),
        ("per_device_train_batch_size: yes", "per_device_train_batch_size = True is not allowed; allowed: a whole number"),
        ("max_steps: 2.5", "max_steps = 2.5 is not allowed; allowed: a whole number"),
        ("optim: {a: 1}", "optim = {'a': 1} is not allowed; allowed: text"),
        ("sizes: 3", "sizes = 3 is not allowed; allowed: a mapping"),
        (
            "arms: {baseline: {}, teleport: {teleport_epoch: 1}}",
            "'teleport_epoch' in arm 'teleport'; the nearest is 'teleport_epochs'",
        ),
        ("arms: [a]", "allowed: a mapping from names"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(text, said, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(EXPERIMENT + ("" if text.startswith("arms") else ARMS) + text)
    assert main(["experiment", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(file) in error


def test_compare_says_what_it_does_and_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--clock cpu_seconds", "warmup, random_move, identity, matched_rate", "at equal time and at equal samples"):
        assert words in told
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    file = tmp_path / "one_arm.yaml"
    file.write_text("{dataset: mnist, model: mlp, arms: {null_space: {}}, learning_rates: [0.1], seeds: [0]}")
    assert main(["compare", str(file)]) == 2
    assert "allowed: one of them is 'baseline'" in capsys.readouterr().err
