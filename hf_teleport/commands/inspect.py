"""`hf-teleport inspect`: list which weights of a model would move, and why the others would not."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from hf_teleport.commands.parser import MODEL, Subparsers, add_command, add_inputs, positive
from hf_teleport.config import SYMMETRIES, TeleportConfig
from hf_teleport.display.quantities import count, duration, size
from hf_teleport.report import LayerReport, SymmetryReport

if TYPE_CHECKING:
    from hf_teleport.inspection import Inspection, RunCost

# 'auto' chooses one of these, and a name with '+' joins two of them.
METHODS = [name for name in get_args(get_type_hints(TeleportConfig)["method"]) if name != "auto" and "+" not in name]


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "inspect",
        run,
        help="list which weights of a model would move, and why the others would not",
        description="Judges every weight of a model on one batch: its role, the dimension of its inputs' null space, whether "
        "it moves, and if not, why. With --method basis: the model's exact symmetries, and why one does not turn. With another "
        "method: which weights it may move. Prints a table. Trains nothing and writes no file.",
        epilog="For instance:\n  hf-teleport inspect llama --set hidden_size=64 num_hidden_layers=2\n"
        "  hf-teleport inspect path/to/model --data rows.parquet --json",
    )
    command.add_argument("model", help=MODEL)
    add_inputs(command)
    command.add_argument("--method", choices=METHODS, default="null_space", help="method of teleportation")
    command.add_argument("--max_steps", type=positive, default=1000, help="steps of a run; --method basis estimates its cost")
    command.add_argument("--processes", type=positive, default=1, help="processes of that run")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Inspect and print."""
    from hf_teleport.inputs.models import model_and_batch
    from hf_teleport.inputs.synthetic import synthetic_loss
    from hf_teleport.inspection import inspect_model, judged, run_cost
    from hf_teleport.teleporter import Teleporter

    model, batch = model_and_batch(arguments.model, arguments.set, arguments.data, arguments.batch_size, arguments.length)
    if arguments.method == "null_space":
        inspection = inspect_model(model, batch, synthetic_loss)
        if arguments.json:
            print(json.dumps(inspection.to_dict(), indent=1))
        else:
            _print_inspection(arguments, inspection)
        return
    every_symmetry = {"symmetries": list(SYMMETRIES)} if arguments.method == "basis" else {}
    config = TeleportConfig.from_dict({"method": arguments.method, **every_symmetry})
    found = judged(Teleporter(model, config), batch, synthetic_loss)
    reports: Sequence[Any] = found.symmetries or found.layers
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    elif found.symmetries:
        _print_symmetries(arguments.model, found.symmetries)
        if any(not symmetry.reason for symmetry in found.symmetries):
            _say_cost(run_cost(model, batch, synthetic_loss, arguments.max_steps, arguments.processes))
    else:
        _print_layers(f"{arguments.model}: what method {arguments.method!r} may move", found.layers)


def _print_symmetries(name: str, symmetries: list[SymmetryReport]) -> None:
    columns = ("symmetry", "written by", "rotations", "weights", "turns")
    rows = [
        [
            symmetry.kind,
            symmetry.name,
            f"{symmetry.blocks} x {symmetry.size}",
            count(symmetry.weights),
            _turns(symmetry),
        ]
        for symmetry in sorted(symmetries, key=lambda s: bool(s.reason))
    ]
    _print(f"{name}: symmetries that a change of basis can turn", columns, rows)
    if any("not uniform and cannot be folded" in symmetry.reason for symmetry in symmetries):
        _say(
            "Such gains are uniform before training. In a run from scratch, method 'auto' or teleport_blocking_gains='hold' "
            "keeps them uniform until the turn. In a trained model, 'round' makes them uniform, if the loss allows it."
        )


def _turns(symmetry: SymmetryReport) -> str:
    if symmetry.reason:
        return f"no: {symmetry.reason}"
    return "yes" if symmetry.kind in TeleportConfig().symmetries else "only if `symmetries` names it"


def _say_cost(run: "RunCost") -> None:
    event, steps = run.event, ", ".join(map(count, run.steps))
    check = event.event_seconds - event.decomposition_seconds - event.turn_seconds
    parts = {"the check on a batch": check, "decompositions": event.decomposition_seconds, "the turn": event.turn_seconds}
    _say(
        f"An event takes about {duration(event.event_seconds)} on batches like this one, with AdamW: "
        f"{', '.join(f'{duration(seconds)} for {name}' for name, seconds in parts.items())}. "
        f"It needs {size(event.event_bytes)} beside a batch's activations."
    )
    _say(
        f"A run of {count(run.max_steps)} steps has {len(run.steps)} events, before steps {steps}, and reads the gradients of "
        f"{count(run.looks)} steps, {duration(event.look_seconds)} each. That is {duration(run.seconds)} in all, {run.share:.1%} "
        f"of {count(run.max_steps)} passes over such a batch. The second moments take {size(run.moment_bytes)}."
    )
    for process, planned in run.by_process.items():
        sizes: Counter[int] = Counter()
        for each in planned:
            sizes[each.symmetry.size] += each.symmetry.blocks
        shown = ", ".join(f"{count(blocks)} of {width} x {width}" for width, blocks in sizes.items())
        seconds = duration(sum(each.seconds for each in planned))
        _say(f"Process {process} decomposes on {run.device}, in float64, while training waits: {shown}; {seconds}.")


def _print_inspection(arguments: argparse.Namespace, inspection: "Inspection") -> None:
    from hf_teleport.inspection import THRESHOLDS

    columns = ["rows", *(f"{tau:g}" for tau in THRESHOLDS), "time"]
    numbers = {
        layer.name: [
            count(layer.tokens) if layer.tokens else "",
            *(count(layer.null_dims[f"{tau:g}"]) if f"{tau:g}" in layer.null_dims else "" for tau in THRESHOLDS),
            duration(layer.seconds) if layer.movable else "",
        ]
        for layer in inspection.layers
    }
    title = f"{arguments.model}: what method 'null_space' would move; null dimensions at tau"
    _print_layers(title, inspection.layers, columns, numbers)
    _say(
        f"{inspection.movable_share:.1%} of the elements may move, {inspection.moved_share:.1%} did in one step on this batch; "
        f"the decompositions took {duration(sum(layer.seconds for layer in inspection.layers))}."
    )
    _say(f"A null space event at its default settings, on batches like this one, may take {inspection.cost}.")
    _say(
        f"These are null spaces of {count(arguments.batch_size)} {'rows' if arguments.data else 'random samples'}. A teleport "
        "reads num_batches x batch_size samples, and more samples leave smaller null spaces: try --batch_size"
        f"{'' if arguments.data else ' and --data'}."
    )
    _say("The default method, 'auto', may change the basis instead: see --method basis, and `hf-teleport doctor --model`.")


def _print_layers(
    title: str, layers: Sequence[LayerReport], columns: Sequence[str] = (), numbers: dict[str, list[str]] | None = None
) -> None:
    """Print a row for each weight. The reasons why weights stay are numbered, and follow below the table.

    Args:
        columns: names of more columns.
        numbers: their cells, by the layer's name.
    """
    notes: dict[str, int] = {}
    # Elementwise weights are many, and a row that says one stays tells little.
    shown = [layer for layer in layers if len(layer.shape) > 1 or layer.movable]
    rows = [
        [
            layer.name,
            f"no ({notes.setdefault(layer.reason, len(notes) + 1)})" if layer.reason else "yes",
            layer.role,
            "x".join(map(str, layer.shape)),
            *(numbers or {}).get(layer.name, []),
        ]
        for layer in shown
    ]
    _print(title, ("layer", "moves", "role", "shape", *columns), rows)
    for reason, number in notes.items():
        _say(f"({number}) {reason}")
    if len(shown) < len(layers):
        _say(f"{count(len(layers) - len(shown))} elementwise parameters are not shown.")


def _print(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    from hf_teleport.training.summary import console

    table = Table(title=title, box=box.SIMPLE)
    for column in columns:
        # Long names and reasons are wrapped. Numbers stay on one line.
        table.add_column(column, overflow="fold", no_wrap=column not in ("layer", "written by", "turns"))
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _say(text: str) -> None:
    from hf_teleport.training.summary import console

    console().print(text, highlight=False)
