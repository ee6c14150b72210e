"""Processes forked from one that has imported what tests import: an import costs seconds, a fork next to nothing."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

context = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "killable", "ranks", "tiny_runs", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel"]
IMPORTED += ["matplotlib.pyplot", "nltk", "sklearn.datasets"]


def quick_collection():
    """Trainer collects garbage when a run begins: what was imported is none."""
    gc.freeze()


def start():
    """Start the process that is forked from, unless it runs already. It and all others have one thread."""
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def _script(words, folder, variables):
    quick_collection()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ |= variables
    sys.argv, sys.path[0:0] = words, [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")


def run(command, env, **_):
    """As `subprocess.run` for [sys.executable, script, *words].

    What libraries read from the environment as they are imported stays as it was when they were, such as the number of threads.
    """
    start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(name="MainProcess", target=_script, args=(command[1:], folder, env))
        process.start()
        process.join()
        told = [(folder / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(command, process.exitcode, *told)
