"""`hf-teleport train`: run a Transformers example with teleportation."""

import argparse
import textwrap

from hf_teleport.commands.parser import Subparsers, add_command
from hf_teleport.tasks import TASKS, train

_TASKS = "\n".join(textwrap.fill(f"  {name:22}{what}", 78, subsequent_indent=" " * 24) for name, what in TASKS.items())

_EPILOG = f"""tasks:
{_TASKS}

For instance:
  hf-teleport train clm configs/examples/ptb_clm.yaml --learning_rate 1e-3

hf-teleport train TASK --help lists the task's arguments. On several devices:
  accelerate launch -m hf_teleport.cli train TASK ..."""


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "train",
        run,
        help="train a model with teleportation, in one of the well-known Transformers examples",
        description="Trains, evaluates and saves. Takes the arguments of the Transformers examples and of teleportation. "
        "Afterwards output_dir has the model, its card, the metrics as JSON, and teleports.json for hf-teleport report.",
        epilog=_EPILOG,
    )
    command.add_argument("task", metavar="TASK", choices=list(TASKS), help="one of the tasks below")
    command.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="[CONFIG.yaml] [--ARGUMENT VALUE ...]",
        help="a YAML file of arguments, and arguments that override it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and save."""
    train(arguments.task, arguments.words)
