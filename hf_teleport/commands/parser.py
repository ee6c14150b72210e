"""Shared parts of the subcommands' parsers."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "a Hub id, a local folder, or a config name (llama, bert, vit, ...) for random weights"

Subparsers = Any
"""The type that `ArgumentParser.add_subparsers` returns. argparse has no public name for it."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Wraps each paragraph of a description or epilog separately. Lines that begin with a blank stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines()]
        return "\n".join(lines)


def add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int | None], help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a subcommand's parser, without arguments.

    Args:
        run: does the work and returns the exit code. None means 0.
        help: the line in `hf-teleport --help`.
        description, epilog: the texts around the options in the subcommand's own help.
    """
    command = subparsers.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=Help)
    command.set_defaults(run=run)
    return command


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model's sizes and its batch: --set, --data, --batch_size, --length."""
    command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="sizes for a config name, e.g. hidden_size=64")
    command.add_argument(
        "--data", type=Path, help="parquet, JSON or CSV file of rows with the model's inputs; default: random ones"
    )
    command.add_argument("--batch_size", type=positive, default=2, help="samples in the batch")
    command.add_argument("--length", type=positive, default=16, help="tokens in a random sequence")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from 1")
    return int(text)
