"""`hf-teleport compare`: test whether teleports help, against the same optimizer at its best learning rate."""

import argparse

from hf_teleport.commands.parser import Subparsers, add_command
from hf_teleport.commands.yaml_file import add_config, named, quieten


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "compare",
        run,
        help="test whether the teleports of a YAML file help, against the baseline at its best learning rate",
        description="Searches the best learning rate of each arm with the first seed. Then trains the arms and their controls "
        "with all seeds, and judges each at equal time and at equal samples. A finished run is not trained again, so an "
        "interrupted comparison goes on when it is started again. Prints a table and sentences, and writes comparison.csv, "
        ".json, .png into output_dir; hf-teleport report makes one page of them.",
        epilog="For instance:\n  hf-teleport compare configs/compare/digits_mlp_sgd.yaml --seeds 0 1\n\n"
        "--clock cpu_seconds compares CPU time, for a machine that has other work to do. It works for one process on a CPU. "
        "--controls some of warmup, random_move, identity, matched_rate; '[]' for none.",
    )
    add_config(command, "configs/compare/mnist_mlp_sgd.yaml")


def run(arguments: argparse.Namespace) -> None:
    """Train the unfinished runs, judge, print and write."""
    from hf_teleport.lab.compare import compare, protocol
    from hf_teleport.lab.report import sentences, table, write
    from hf_teleport.lab.settings import read
    from hf_teleport.training.summary import console

    with named(arguments.config):
        planned = protocol(read(arguments.config, arguments.overrides))
    is_main = quieten(planned.whole.runs[0].training)
    comparison = compare(planned)
    if is_main:
        paths = write(comparison)
        console(180).print(table(comparison))
        print(*sentences(comparison), sep="\n")
        print(f"Written: {', '.join(map(str, paths))}")
