"""Processes forked from one that has imported what tests import: an import costs seconds, a fork next to nothing."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

context = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "killable", "ranks", "tiny_runs", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel"]


def start():
    """Start the process that is forked from, unless it runs already."""
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
