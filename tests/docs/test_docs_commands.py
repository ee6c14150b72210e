"""Every command line of the documentation is accepted by what it calls; those that take seconds are run.

A page's bash blocks run in a real bash in which each program is a stub that notes its words, so that comments, loops and
patterns mean what they mean to a reader. Each call is then handed to the real argument parser, in a folder that has what the
page speaks of: the clone, a saved model, rows of data. `inspect` and `doctor` are run; what the other commands do is tested in
test_cli.py, test_compare.py, test_examples.py, test_experiments.py, test_html.py and test_scripts.py.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from pages import PAGES, ROOT, blocks
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser

from hf_teleport import cli
from hf_teleport.commands import plot, report, turn_back
from hf_teleport.lab import compare, runs

from tiny_runs import llama

PROGRAMS = ["hf-teleport", "python", "python3", "pip", "accelerate", "torchrun", "make"]

# Words end with the unit separator, calls with the record separator.
STUB = """#!/bin/sh
for word in "${0##*/}" "$@"; do printf '%s\\037' "$word"; done >> "$CALLS"
printf '\\036' >> "$CALLS"
"""

# A script of the reader's own takes the arguments of any other one.
OWN_SCRIPTS = dict.fromkeys(["your_script.py", "script.py"], "scripts/examples/run_image_classification.py")

# A new model is inspected at a smaller size than its usual one.
SMALLER = {"t5": ["--set", "num_layers=1", "d_model=64", "d_ff=128", "vocab_size=200"]}


class Accepted(Exception):  # noqa: N818  (it is none)
    """The arguments were; nothing else is to happen."""


def accepted(*_, **__):
    raise Accepted


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The clone as a reader's session leaves it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "scripts", "docs", "Makefile", "pyproject.toml", "setup.cfg", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    llama(vocab_size=128).save_pretrained(folder / "path" / "to" / "saved" / "model")
    for name in ("untied", "tied"):
        pretrained = folder / "runs" / "study" / "pretrained" / name / "baseline" / "lr0.001" / "seed7" / "model"
        llama(vocab_size=128).save_pretrained(pretrained)
        (pretrained / "tokenizer_config.json").write_text("{}")
    Dataset.from_list([{"input_ids": list(range(8)), "labels": list(range(8))}] * 4).to_parquet(folder / "rows.parquet")
    (folder / "my.yaml").write_text(yaml.safe_dump({"base": str(ROOT / "configs/compare/digits_mlp_sgd.yaml")}))
    other = folder / "runs/compare/ptb_llama_adamw/experiment.yaml"
    other.parent.mkdir(parents=True)
    other.write_text(yaml.safe_dump({"base": str(ROOT / "configs/compare/ptb_llama_adamw.yaml")}))
    stubs = folder / ".venv" / "bin"
    stubs.mkdir(parents=True)
    for name in PROGRAMS:
        stub = stubs / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    (folder / ".venv-timm").symlink_to(folder / ".venv")
    return folder


def calls(block, folder):
    """The words of each program that a bash block calls, in order."""
    notes = folder / "calls"
    notes.unlink(missing_ok=True)
    environment = {"PATH": f"{folder / '.venv/bin'}", "CALLS": str(notes)}
    done = subprocess.run(["/bin/bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    return [call.split("\037")[:-1] for call in notes.read_text().split("\036")[:-1]]


def check(words):
    """That a command is accepted.

    Raises:
        SystemExit, ValueError, OSError, AssertionError: it is not.
    """
    program, *words = [OWN_SCRIPTS.get(word, word) for word in words if word != "..."]
    for word in words:
        assert not word.startswith(("configs/", "scripts/")) or os.path.exists(word), word
    if program == "make":
        done = subprocess.run(["make", "--dry-run", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        check_install(words)
    elif program == "hf-teleport":
        check_ours(words)
    elif program in ("accelerate", "torchrun"):
        if program == "accelerate":
            assert words[0] == "launch"
            given = launch_command_parser().parse_args(words[1:])
        else:
            given = get_args_parser().parse_args(words)
        check(["python", *(["-m"] if given.module else []), given.training_script, *given.training_script_args])
    elif words[:2] == ["-m", "hf_teleport.cli"]:
        check_ours(words[2:])
    elif words[0] == "-m":
        assert words[1] in ("venv", "pytest"), words
    else:
        check_script(*words)


def check_line(line, folder):
    for words in calls(line, folder):
        check(words)


def check_install(words):
    allowed = argparse.ArgumentParser()
    allowed.add_argument("command", choices=["install"])
    allowed.add_argument("packages", nargs="*")
    allowed.add_argument("--constraint")
    allowed.add_argument("--editable", nargs="?", default="")
    given = allowed.parse_args(words)
    assert given.constraint is None or os.path.exists(given.constraint)
    extras = re.findall(r"\[(\w+)\]", " ".join([*given.packages, given.editable]))
    named = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
    assert all(f"\n{extra} =\n" in named for extra in extras), extras


def check_ours(words):
    """A command of hf-teleport: run if it is quick, else only read."""
    with pytest.MonkeyPatch.context() as patched:
        # Where their work begins.
        patched.setattr(runs, "execute", accepted)
        patched.setattr(compare, "compare", accepted)
        if words[0] == "train":
            stop_after(patched, HfArgumentParser, "parse_args_into_dataclasses")
        for command in (report, plot, turn_back):
            patched.setattr(command, "run", accepted)
        if "--help" in words:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main(words)
        elif words[0] in ("inspect", "doctor"):
            assert cli.main([*words, *SMALLER.get(words[-1], [])]) == 0, words
        else:
            with pytest.raises(Accepted):
                assert cli.main(words) == 0, words


def check_script(script, *words):
    source = Path(script).read_text()
    if "parser" not in source and "parse(" not in source and "main(sys.argv" not in source:
        assert not words, f"{script} takes no arguments"
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [script, *words])
        patched.syspath_prepend(str(Path(script).resolve().parent))
        stop_after(patched, argparse.ArgumentParser, "parse_args")
        stop_after(patched, HfArgumentParser, "parse_args_into_dataclasses")
        with pytest.raises(Accepted):
            runpy.run_path(script, run_name="__main__")


def stop_after(patched, owner, name):
    """Let a method do its work, and raise `Accepted` instead of returning, unless it returns words that it did not know."""
    method = getattr(owner, name)

    def stopping(*args, **kwargs):
        found = method(*args, **kwargs)
        return found if kwargs.get("return_remaining_strings") and found[-1] else accepted()

    patched.setattr(owner, name, stopping)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_commands_are_accepted(page, clone, monkeypatch):
    monkeypatch.chdir(clone)
    seen = set()
    for block in blocks(page, "bash"):
        for words in calls(block, clone):
            # A loop over many files of a kind is checked with one of them.
            kind = tuple(re.sub(r"^(configs/\w+)/.*", r"\1", word) for word in words)
            if kind not in seen:
                seen.add(kind)
                check(words)


def inline(page):
    """Commands with arguments within the text, but for those with a PLACEHOLDER or without the script that is launched."""
    programs = r"hf-teleport \w+|python|(?:accelerate launch|torchrun)(?=.*(?:\.py| -m ))|scripts/\S+\.py"
    for code in re.findall(rf"`((?:{programs}) [^`\n]+)`", page.read_text()):
        if not re.search(r"\b[A-Z]{4,}\b|\.\.\.|@", code):
            yield f"python {code}" if code.startswith("scripts/") else code


@pytest.mark.parametrize("page", [p for p in PAGES if any(inline(p))], ids=lambda p: p.name)
def test_commands_within_the_text_are_accepted(page, clone, monkeypatch):
    monkeypatch.chdir(clone)
    for line in dict.fromkeys(inline(page)):
        check_line(line, clone)


@pytest.mark.parametrize(
    "line",
    [
        "hf-teleport inspekt llama",
        "hf-teleport compare configs/compare/none.yaml",
        "hf-teleport compare configs/compare/digits_mlp_sgd.yaml --seed 3",
        "hf-teleport train clm --no_such_argument 3",
        "accelerate launch --no_such_option scripts/examples/run_clm.py",
        "python scripts/none.py",
        "python scripts/examples/run_clm.py --no_such_argument 1",
        "make none",
        "unknown --help",
    ],
)
def test_a_wrong_command_is_found(line, clone, monkeypatch):
    monkeypatch.chdir(clone)
    with pytest.raises((SystemExit, ValueError, OSError, AssertionError, pytest.fail.Exception)):
        check_line(line, clone)
