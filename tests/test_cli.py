"""The command as a whole: exit codes, help, the version, and that none of this waits for torch."""

import json
import subprocess
import sys

import pytest

import hf_teleport
from hf_teleport.cli import main


def test_words_and_values_of_a_task_that_cannot_be(tmp_path, capsys):
    file = tmp_path / "task.yaml"
    file.write_text("config_name: bert\nlearning_rate: [1, 2]\n")
    assert main(["train", "glue", str(file)]) == 2
    assert f"{file}: learning_rate = [1, 2] is not allowed; allowed: a number." in capsys.readouterr().err
    assert main(["train", "glue", "--trian_file", "x.csv"]) == 2
    assert "unknown key 'trian_file' in the command line; the nearest is 'train_file'" in capsys.readouterr().err


def test_exit_codes(monkeypatch, capsys):
    def ends(error):
        def look(*args, **kwargs):
            raise error

        monkeypatch.setattr("hf_teleport.html.write", look)
        return main(["report", "x"])

    assert ends(ValueError("wrong")) == 2
    assert ends(KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError, match="the run's own"):  # which Python makes a traceback and 1 of
        ends(RuntimeError("the run's own"))
    with pytest.raises(SystemExit) as ended:
        main(["frobnicate"])
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["", "inspect", "doctor", "train", "experiment", "compare", "plot", "report"])
def test_help_fits_a_terminal_and_has_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert f"For instance:\n  hf-teleport {command}" in told
    assert bool(command) or "Exit codes: 0 done; 1 a run failed" in told


# Each takes seconds to import.
SLOW = ["torch", "transformers", "datasets", "accelerate", "numpy", "pandas", "huggingface_hub"]

IMPORTED = """
import contextlib, io, json, sys

with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    {code}
print(json.dumps([name for name in {slow} if name in sys.modules]))
"""


def imported(code):
    """Which of the slow libraries a line of Python has imported, in a process of its own."""
    program = IMPORTED.format(code=code, slow=SLOW)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["frobnicate"],
        [],
        ["inspect", "llama", "--no_such_option"],
        ["inspect", "llama", "--method", "dance"],
        ["doctor", "--help"],
        ["train", "dancing"],
        ["train", "--help"],
        ["experiment", "--help"],
        ["compare"],
        ["plot", "--help"],
        ["report", "--help"],
    ],
    ids=" ".join,
)
def test_parsers_do_not_wait_for_torch(words):
    assert imported(f"from hf_teleport.cli import main; main({words!r})") == []


def test_settings_do_not_wait_for_torch():
    assert imported("from hf_teleport import TeleportConfig, __version__; TeleportConfig(method='basis')") == []
    assert imported("from hf_teleport import Teleporter")[:1] == ["torch"]


def test_names_are_imported_when_they_are_asked_for():
    assert set(hf_teleport._HOME) | {"__version__"} == set(hf_teleport.__all__)
    for name, module in hf_teleport._HOME.items():
        assert getattr(hf_teleport, name).__module__ == f"hf_teleport.{module}"
    assert set(hf_teleport.__all__) <= set(dir(hf_teleport))
    with pytest.raises(AttributeError, match="'hf_teleport' has no attribute 'Telepotrer'"):
        hf_teleport.Telepotrer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name"):
        from hf_teleport import Telepotrer  # noqa: F401


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hf-teleport {hf_teleport.__version__}\n"
