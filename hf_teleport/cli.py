"""The `hf-teleport` command."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from hf_teleport.commands.loading import model_and_batch
from hf_teleport.commands.synthetic import synthetic_loss
from hf_teleport.config import SYMMETRIES, TeleportConfig
from hf_teleport.inspection import THRESHOLDS, Inspection, inspect_model
from hf_teleport.report import SymmetryReport
from hf_teleport.tasks import TASKS, train
from hf_teleport.teleporter import Teleporter
from hf_teleport.training.summary import console

_MODEL = "a Hub id, a local folder, or a config name (llama, bert, vit, ...) for random weights"


_CODES = (
    "Exit codes: 0 done; 1 a run failed, with its traceback, or doctor misses what is required; 2 arguments, settings or files "
    "that cannot be; 130 interrupted."
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps each paragraph of a description or an epilog by itself; lines that begin with a blank stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines()]
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1, `doctor` misses what is required; 2, bad input; 130, interrupted. What else fails in a run is raised.
    """
    parser = argparse.ArgumentParser(
        prog="hf-teleport",
        formatter_class=_Help,
        description="Teleportation for Transformers models.",
        epilog=f"For instance:\n  hf-teleport doctor\n  hf-teleport train glue configs/examples/sst2_glue.yaml\n\n{_CODES}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    look = commands.add_parser(
        "inspect",
        help="what would move in a model, and what would not and why",
        description="Judges every weight of a model on one batch: its role, the dimension of its inputs' null space, whether "
        "it moves, and if not, why. With --method basis: its exact symmetries, and why one does not turn. Nothing is trained. "
        "Prints a table, and nothing is written.",
        formatter_class=_Help,
        epilog="For instance:\n  hf-teleport inspect llama --set hidden_size=64 num_hidden_layers=2\n"
        "  hf-teleport inspect path/to/model --data rows.parquet --json",
    )
    look.add_argument("model", help=_MODEL)
    _add_inputs(look)
    look.add_argument("--method", choices=["null_space", "basis"], default="null_space", help="of teleportation")
    look.add_argument("--json", action="store_true", help="print JSON instead of a table")
    look.set_defaults(run=_inspect)
    doctor = commands.add_parser(
        "doctor",
        help="whether everything needed is here, and what a teleport would do to a model",
        formatter_class=_Help,
        description="Looks at libraries, devices, distributed backends and the Hub, and prints a line for each, with the way out "
        "where it is not as it should be. Exit code 0: all that is required is here, in supported versions; 1: it is not.",
        epilog="For instance:\n  hf-teleport doctor --model path/to/model",
    )
    doctor.add_argument("--model", help=f"also what would move in it, and what method 'auto' comes to: {_MODEL}")
    _add_inputs(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON instead of lines")
    doctor.set_defaults(run=_doctor)
    learn = commands.add_parser(
        "train",
        help="train a model with teleportation: the well-known Transformers examples",
        formatter_class=_Help,
        description="Trains with the arguments of the Transformers examples and those of teleportation, evaluates, and saves: in "
        "output_dir are then the model, its card, the metrics as JSON, and teleports.json for hf-teleport report.",
        epilog="tasks:\n"
        + "\n".join(textwrap.fill(f"  {name:22}{what}", 78, subsequent_indent=" " * 24) for name, what in TASKS.items())
        + "\n\nFor instance:\n  hf-teleport train clm configs/examples/ptb_clm.yaml --learning_rate 1e-3\n\n"
        "hf-teleport train TASK --help lists the task's arguments. On several devices:\n"
        "  accelerate launch -m hf_teleport.cli train TASK ...",
    )
    learn.add_argument("task", metavar="TASK", choices=list(TASKS), help="one of those below")
    learn.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="[CONFIG.yaml] [--ARGUMENT VALUE ...]",
        help="a YAML file of arguments, and arguments that win over the file's",
    )
    learn.set_defaults(run=_train)
    trial = commands.add_parser(
        "experiment",
        help="train every arm of a YAML file at every learning rate with every seed",
        formatter_class=_Help,
        description="Every arm sees the same data, and starts from the same weights. What is finished is not trained again: "
        "interrupted, it goes on when it is started again. Each run's history is kept in a folder of its own in output_dir; "
        "hf-teleport plot shows them.",
        epilog="For instance:\n  hf-teleport experiment configs/paper/cpu/mnist_sgd.yaml --seeds 0",
    )
    trial.add_argument("config", help="YAML file, for instance configs/paper/cpu/mnist_sgd.yaml")
    trial.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="settings that win over the file's")
    trial.set_defaults(run=_experiment)
    contest = commands.add_parser(
        "compare",
        help="whether the teleports of a YAML file help against its baseline at its best learning rate",
        description="Searches the best learning rate of each arm with the first seed, trains what is to be compared, controls "
        "included, with all seeds, and judges each at equal time and at equal samples. What is finished is not trained again: "
        "interrupted, it goes on when it is started again. Prints a table and sentences, and writes comparison.csv, .json, .png "
        "into output_dir; hf-teleport report makes one page of them.",
        formatter_class=_Help,
        epilog="For instance:\n  hf-teleport compare configs/compare/digits_mlp_sgd.yaml --seeds 0 1\n\n"
        "--clock cpu_seconds compares CPU time instead of time: on a machine that has other work to do, and only for one "
        "process on a CPU. --controls some of warmup, random_move, matched_rate; '[]' for none.",
    )
    contest.add_argument("config", help="YAML file, for instance configs/compare/mnist_mlp_sgd.yaml")
    contest.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="settings that win over the file's")
    contest.set_defaults(run=_compare)
    draw = commands.add_parser(
        "plot",
        help="picture, numbers and table of an experiment's training losses",
        description="Draws the training losses of the runs that are finished, prints a table of the final values, and writes "
        "training_loss.png and training_loss.csv into the folder.",
        formatter_class=_Help,
        epilog="For instance:\n  hf-teleport plot runs/cpu/mnist_sgd",
    )
    draw.add_argument("output", type=Path, help="the experiment's output_dir")
    draw.set_defaults(run=_plot)
    told = commands.add_parser(
        "report",
        help="one HTML file of a run, or of a comparison",
        description="Writes what became of a TeleportTrainer's run (its teleports, layer by layer, with pictures), or of a "
        "comparison (its verdicts), as one HTML file, which opens in any browser without a network.",
        formatter_class=_Help,
        epilog="For instance:\n  hf-teleport report runs/cnn --output cnn.html",
    )
    told.add_argument("folder", type=Path, help="the output_dir of a run, or of hf-teleport compare")
    told.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the folder")
    told.set_defaults(run=_report)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"hf-teleport: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-teleport: interrupted; an experiment goes on when it is started again", file=sys.stderr)
        return 130


def _add_inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="sizes for a config name, e.g. hidden_size=64")
    command.add_argument(
        "--data", type=Path, help="parquet, JSON or CSV file of rows with the model's inputs; default: random ones"
    )
    command.add_argument("--batch_size", type=_positive, default=2, help="samples in the batch")
    command.add_argument("--length", type=_positive, default=16, help="tokens in a random sequence")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from 1")
    return int(text)


def _doctor(arguments: argparse.Namespace) -> int:
    from hf_teleport.commands.doctor import examine, foretell, healthy, sentences, to_dict

    findings = examine()
    prognosis = foretell(*_inputs(arguments), synthetic_loss) if arguments.model else None
    print(json.dumps(to_dict(findings, prognosis), indent=1) if arguments.json else "\n".join(sentences(findings, prognosis)))
    return 0 if healthy(findings) else 1


def _train(arguments: argparse.Namespace) -> None:
    train(arguments.task, arguments.words)


def _inputs(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    return model_and_batch(arguments.model, arguments.set, arguments.data, arguments.batch_size, arguments.length)


def _inspect(arguments: argparse.Namespace) -> None:
    model, batch = _inputs(arguments)
    if arguments.method == "basis":
        symmetries = (
            Teleporter(model, TeleportConfig(method="basis", symmetries=list(SYMMETRIES))).check(batch, synthetic_loss).symmetries
        )
        if arguments.json:
            print(json.dumps([asdict(symmetry) for symmetry in symmetries], indent=1))
        else:
            _print_symmetries(arguments.model, symmetries)
        return
    inspection = inspect_model(model, batch, synthetic_loss)
    if arguments.json:
        print(json.dumps(inspection.to_dict(), indent=1))
    else:
        _print_table(arguments.model, inspection)
        console().print(
            f"The null spaces are those of {arguments.batch_size} {'rows' if arguments.data else 'random samples'}. A teleport "
            "reads num_batches x batch_size samples, and more of them leave less free: try --batch_size"
            f"{'' if arguments.data else ' and --data'}.",
            highlight=False,
        )


def _experiment(arguments: argparse.Namespace) -> None:
    from hf_teleport.lab.runs import execute
    from hf_teleport.lab.settings import plan, read

    with _named(arguments.config):
        experiment = plan(read(arguments.config, arguments.overrides))
    is_main = _quieten(experiment.runs[0].training)
    done = execute(experiment)
    if is_main:
        print(f"{done} of {len(experiment.runs)} runs were left to do; look at them with: hf-teleport plot {experiment.output}")


def _compare(arguments: argparse.Namespace) -> None:
    from hf_teleport.lab.compare import compare, protocol
    from hf_teleport.lab.report import sentences, table, write
    from hf_teleport.lab.settings import read

    with _named(arguments.config):
        planned = protocol(read(arguments.config, arguments.overrides))
    is_main = _quieten(planned.whole.runs[0].training)
    comparison = compare(planned)
    if is_main:
        paths = write(comparison)
        console(180).print(table(comparison))
        print(*sentences(comparison), sep="\n")
        print(f"Written: {', '.join(map(str, paths))}")


@contextmanager
def _named(file: str) -> Iterator[None]:
    """What is wrong with settings is said with the file that they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error


def _quieten(training: Any) -> bool:
    """Show no bars but that over the runs; returns whether this is the process that speaks."""
    import datasets
    import transformers

    # Every checkpoint would show one.
    transformers.utils.logging.disable_progress_bar()
    is_main = training.process_index == 0
    if training.disable_tqdm or not is_main:
        datasets.disable_progress_bars()
    return is_main


def _plot(arguments: argparse.Namespace) -> None:
    from hf_teleport.lab.plot import FIGURE, NUMBERS, plot

    table = plot(arguments.output)
    console().print(table)
    print(f"Written: {arguments.output / FIGURE}, {arguments.output / NUMBERS}")


def _report(arguments: argparse.Namespace) -> None:
    from hf_teleport.html import write
    from hf_teleport.reporting.outcome import outcome
    from hf_teleport.training.summary import table

    # First, for it needs no matplotlib.
    if (run := outcome(arguments.folder)) and run.events:
        console().print(table(run.events))
    print(f"Written: {write(arguments.folder, arguments.output)}")


def _print_symmetries(name: str, symmetries: list[SymmetryReport]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{name}: symmetries that a change of basis can turn", box=box.SIMPLE)
    for column in ("symmetry", "written by", "rotations", "weights", "turns"):
        table.add_column(column, overflow="fold")
    for symmetry in sorted(symmetries, key=lambda s: bool(s.reason)):
        size = f"{symmetry.blocks} x {symmetry.size}"
        table.add_row(
            symmetry.kind, symmetry.name, size, str(symmetry.weights), f"no: {symmetry.reason}" if symmetry.reason else "yes"
        )
    out = console()
    out.print(table)
    if any("not uniform and cannot be folded" in symmetry.reason for symmetry in symmetries):
        out.print(
            "Such gains are uniform before training. In a run from scratch method 'auto', or teleport_blocking_gains='hold', "
            "keeps them so until the turn; in a trained model 'round' makes them so, if the loss allows it.",
            highlight=False,
        )


def _print_table(name: str, inspection: Inspection) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{name}: what a teleport would move; null dimensions at tau", box=box.SIMPLE)
    table.add_column("layer", overflow="fold", min_width=20)
    for column in ("moves", "role", "shape", "rows", *(f"{tau:g}" for tau in THRESHOLDS), "seconds"):
        table.add_column(column, no_wrap=True)
    notes: dict[str, int] = {}
    for layer in inspection.layers:
        if len(layer.shape) < 2 and not layer.movable:
            continue
        table.add_row(
            layer.name,
            "yes" if layer.moved else f"no ({notes.setdefault(layer.reason, len(notes) + 1)})",
            layer.role,
            "x".join(map(str, layer.shape)),
            str(layer.tokens or ""),
            *(str(layer.null_dims.get(f"{tau:g}", "")) for tau in THRESHOLDS),
            f"{layer.seconds:.3f}" if layer.movable else "",
        )
    out = console()
    out.print(table)
    for reason, number in notes.items():
        out.print(f"({number}) {reason}", highlight=False)
    elementwise = sum(len(layer.shape) < 2 and not layer.movable for layer in inspection.layers)
    out.print(
        f"{inspection.movable_share:.1%} of the elements may move, {inspection.moved_share:.1%} did in one step on this batch; "
        f"{elementwise} elementwise parameters are not shown; decompositions {sum(x.seconds for x in inspection.layers):.2f} s."
    )
    out.print(f"An event at the default settings, on batches like this one, may take {inspection.cost}.", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
