"""What the subcommands share that run a YAML file of arms: experiment and compare."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def add_config(command: argparse.ArgumentParser, example: str) -> None:
    """The file, and the settings that win over it."""
    command.add_argument("config", help=f"YAML file, for instance {example}")
    command.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="settings that win over the file's")


@contextmanager
def named(file: str) -> Iterator[None]:
    """Errors about settings name the file that they are from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error


def quieten(training: Any) -> bool:
    """Show no progress bar but the one over the runs.

    Args:
        training: the training arguments of a run.

    Returns:
        Whether this is the main process.
    """
    import datasets
    import transformers

    # Every checkpoint would show one.
    transformers.utils.logging.disable_progress_bar()
    is_main = training.process_index == 0
    if training.disable_tqdm or not is_main:
        datasets.disable_progress_bars()
    return is_main
