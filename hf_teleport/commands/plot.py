"""`hf-teleport plot`: draw an experiment's training losses, and write them as numbers and a table."""

import argparse
from pathlib import Path

from hf_teleport.commands.parser import Subparsers, add_command


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "plot",
        run,
        help="draw the training losses of an experiment, and print a table of the final values",
        description="Draws the training losses of the finished runs, prints a table of the final values, and writes "
        "training_loss.png and training_loss.csv into the folder.",
        epilog="For instance:\n  hf-teleport plot runs/cpu/mnist_sgd",
    )
    command.add_argument("output", type=Path, help="the experiment's output_dir")


def run(arguments: argparse.Namespace) -> None:
    """Draw, print and write."""
    from hf_teleport.lab.plot import FIGURE, NUMBERS, plot
    from hf_teleport.training.summary import console

    console().print(plot(arguments.output))
    print(f"Written: {arguments.output / FIGURE}, {arguments.output / NUMBERS}")
