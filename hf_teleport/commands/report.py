"""`hf-teleport report`: write a run or a comparison as one HTML file."""

import argparse
from pathlib import Path

from hf_teleport.commands.parser import Subparsers, add_command


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "report",
        run,
        help="write a run or a comparison as one HTML file",
        description="Writes one HTML file about a TeleportTrainer's run (its teleports, layer by layer, with pictures), or about "
        "a comparison (its verdicts). The file opens in any browser without a network.",
        epilog="For instance:\n  hf-teleport report runs/cnn --output cnn.html",
    )
    command.add_argument("folder", type=Path, help="the output_dir of a run, or of hf-teleport compare")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the folder")


def run(arguments: argparse.Namespace) -> None:
    """Print the table of events, and write the file."""
    from hf_teleport.html import write
    from hf_teleport.reporting.outcome import outcome
    from hf_teleport.training.summary import console, table

    # The table comes first, because it needs no matplotlib.
    if (found := outcome(arguments.folder)) and found.events:
        console().print(table(found.events))
    print(f"Written: {write(arguments.folder, arguments.output)}")
