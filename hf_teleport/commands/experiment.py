"""`hf-teleport experiment`: train every arm of a YAML file at every learning rate with every seed."""

import argparse

from hf_teleport.commands.parser import Subparsers, add_command
from hf_teleport.commands.yaml_file import add_config, named, quieten


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "experiment",
        run,
        help="train every arm of a YAML file at every learning rate with every seed",
        description="Every arm sees the same data and starts from the same weights. A finished run is not trained again, so an "
        "interrupted experiment goes on when it is started again. Each run has its own folder in output_dir for its history; "
        "hf-teleport plot shows them.",
        epilog="For instance:\n  hf-teleport experiment configs/paper/cpu/mnist_sgd.yaml --seeds 0",
    )
    add_config(command, "configs/paper/cpu/mnist_sgd.yaml")


def run(arguments: argparse.Namespace) -> None:
    """Train the unfinished runs."""
    from hf_teleport.lab.runs import execute
    from hf_teleport.lab.settings import plan, read

    with named(arguments.config):
        experiment = plan(read(arguments.config, arguments.overrides))
    is_main = quieten(experiment.runs[0].training)
    done = execute(experiment)
    if is_main:
        print(f"{done} of {len(experiment.runs)} runs were trained now. To see them: hf-teleport plot {experiment.output}")
