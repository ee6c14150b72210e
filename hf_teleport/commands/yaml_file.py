"""Shared parts of `experiment` and `compare`, the subcommands that run a YAML file of arms."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def add_config(command: argparse.ArgumentParser, example: str) -> None:
    """Add the arguments: the YAML file, and settings that override it."""
    command.add_argument("config", help=f"YAML file, for instance {example}")
    command.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="settings that override the file")


@contextmanager
def named(file: str) -> Iterator[None]:
    """Add the file's name to errors about its settings."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error


def quieten(training: Any) -> bool:
    """Hide all progress bars except the one over the runs.

    Args:
        training: the training arguments of a run.

    Returns:
        Whether this is the main process.
    """
    import datasets
    import transformers

    # Otherwise loading a checkpoint shows a bar each time.
    transformers.utils.logging.disable_progress_bar()
    is_main = training.process_index == 0
    if training.disable_tqdm or not is_main:
        datasets.disable_progress_bars()
    return is_main
