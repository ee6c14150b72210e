"""What the parsers of the subcommands share."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "a Hub id, a local folder, or a config name (llama, bert, vit, ...) for random weights"

Subparsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Wraps each paragraph of a description or an epilog by itself; lines that begin with a blank stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines()]
        return "\n".join(lines)


def add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int | None], help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A subcommand's parser, without arguments.

    Args:
        run: does the work, and returns the exit code; None is 0.
        help: its line in `hf-teleport --help`.
        description, epilog: of its own help.
    """
    command = subparsers.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=Help)
    command.set_defaults(run=run)
    return command


def add_inputs(command: argparse.ArgumentParser) -> None:
    """The arguments that say what a model is tried on: --set, --data, --batch_size, --length."""
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
