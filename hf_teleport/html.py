"""Write a run or a comparison as one HTML file. It needs no network and no scripts."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from hf_teleport.config import TeleportConfig
from hf_teleport.display.events import angle, cells, columns, how_many, misalignment, total_time
from hf_teleport.display.quantities import count, duration
from hf_teleport.journal import JOURNAL, Event
from hf_teleport.reporting import plots
from hf_teleport.reporting.outcome import STATE, Outcome, outcome
from hf_teleport.version import __version__

REPORT = "report.html"

# Files that `hf-teleport compare` writes.
_COMPARISON, _CURVES = "comparison.json", "comparison.png"

# A long run shows the layers of this many events at its start, and of as many at its end.
_TOLD = 10

# Characters that neither XML nor HTML allows.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")

_LAYER_COLUMNS = ("layer", "role", "shape", "null dimensions", "moved by", "why it stayed")
_SYMMETRY_COLUMNS = ("written by", "symmetry", "rotations", "weights", "misalignment", "turned by", "why it was left out")

Draw = Callable[[Outcome], Any]
"""Makes a figure from a run. None: there is nothing to draw."""

# For each picture: the function that draws it, its caption, and the alternative text. The tables have the numbers.
_PICTURES: list[tuple[Draw, str, str]] = [
    (
        lambda run: plots.training(run.log, run.events),
        "Loss and gradient norm as they were logged; a line is a teleport, dotted if it was undone.",
        "Curves of loss and gradient norm against steps, with a vertical line at each teleport.",
    ),
    (
        lambda run: plots.null_dimensions(run.events),
        "Null space of each layer, as a share of its input dimensions: the room that the weight has to move.",
        "Heat map of layers by events: null dimensions as a share of input dimensions.",
    ),
    (
        lambda run: plots.captured(run.events),
        "Share of each layer's input energy outside its null space; at an energy threshold below 1 the rest may change.",
        "Heat map of layers by events: share of the input energy outside the null space.",
    ),
    (
        lambda run: plots.movement(run.events),
        "How far each weight moved, relative to its norm; blank: it stayed.",
        "Heat map of layers by events: relative movement of each weight.",
    ),
    (
        lambda run: plots.misalignment_over_run(run.events),
        "Misalignment over the run: it falls at each change of basis, and grows until the next. If it has hardly grown, the next "
        "one gains little.",
        "A curve for each kind of symmetry: misalignment before and after each change of basis, against steps.",
    ),
    (
        lambda run: plots.misalignment(run.events),
        "How far from the optimizer's coordinates each symmetry was before its change of basis; 0 is aligned.",
        "Misalignment of each symmetry, a mark for each event.",
    ),
]


def write(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run or a comparison. Returns its path.

    Args:
        output: the file; default: `report.html` in the folder.

    Raises:
        FileNotFoundError: the folder does not exist, or holds neither a run nor a comparison, or the output's folder does not
            exist.
        ValueError: the output is a folder, or a file in the folder can't be read.
        ModuleNotFoundError: matplotlib is not installed, and there is something to draw.
    """
    path = Path(folder, REPORT) if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"output = {str(path)!r} is a folder; allowed: a file, for instance {str(path / REPORT)!r}.")
    if Path(folder).is_dir() and not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for {path.name}: make it, or give another.")
    text = render(folder)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return path


def render(folder: str | Path) -> str:
    """The report as HTML. It is also well-formed XML.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `write`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}: give the output_dir of a run or of a comparison.")
    name = folder.resolve().name
    if (folder / _COMPARISON).exists():
        template, values = "comparison.html", {"title": f"Comparison {name}", **_comparison(folder)}
    elif run := outcome(folder):
        template, values = "run.html", {"title": f"Teleports of {name}", **_run(run)}
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} is neither a run nor a comparison: it has no {JOURNAL}, no {STATE} (there or in a checkpoint) and "
            f"no {_COMPARISON}. Give the output_dir of a TeleportTrainer, or of hf-teleport compare."
        )
    pages = Environment(loader=PackageLoader("hf_teleport.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = pages.get_template(template).render(version=__version__, folder=name, **values)
    return _CONTROL.sub("\ufffd", text)


# --- a run ----------------------------------------------------------------------------------------------------------------


def _run(run: Outcome) -> dict[str, Any]:
    about, events = run.about, run.events
    config, settled = about.get("config", {}), about.get("settled")
    told = events if len(events) <= 2 * _TOLD else [*events[:_TOLD], *events[-_TOLD:]]
    names = columns(events)
    return {
        "summary": _summary(run),
        "notes": _notes(run, told),
        "events": [cells(event, names) for event in events],
        "event_columns": names,
        "images": [image for picture in _PICTURES if (image := _drawn(*picture, run))],
        "details": [_details(event) for event in told if event.get("layers") or event.get("symmetries")],
        "layer_columns": _LAYER_COLUMNS,
        "symmetry_columns": _SYMMETRY_COLUMNS,
        "code": [_code(config), *([f"# what method 'auto' came to\n{_code(settled)}"] if settled else [])] if config else [],
        "settings": [(name, repr(value)) for name, value in config.items()],
        "changed": _changed(config),
        "training": list(about.get("training", {}).items()),
        "versions": list(about.get("versions", {}).items()),
    }


def _summary(run: Outcome) -> list[tuple[str, str]]:
    whole = next((row["train_runtime"] for row in reversed(run.log) if row.get("train_runtime")), None)
    rows = [
        ("Model", run.about.get("model", "")),
        ("Steps", f"{count(run.step)} of {count(run.max_steps or run.step)}" if run.step else ""),
        ("Teleports", how_many(run.events)),
        ("Time in teleports", f"{total_time(run.events)}{f' of {duration(whole)}' if whole else ''}" if run.events else ""),
    ]
    for key, name in (("loss", "Training loss"), ("grad_norm", "Gradient norm"), ("eval_loss", "Evaluation loss")):
        values = [row[key] for row in run.log if isinstance(row.get(key), float | int)]
        rows.append((name, f"{values[0]:.6g} at first, {values[-1]:.6g} at last" if values else ""))
    return [(name, value) for name, value in rows if value]


def _notes(run: Outcome, told: list[Event]) -> list[str]:
    notes = []
    if not run.events:
        notes.append("No teleport was made.")
    elif not run.about:
        notes.append(f"There is no {JOURNAL}: this page has what was logged of the events, but no layers and no settings.")
    if not run.log:
        notes.append(f"There is no {STATE}: a run writes one with each checkpoint, and trainer.save_state() writes one.")
    if len(told) < len(run.events):
        notes.append(f"Layers are shown for the first and the last {_TOLD} events; {JOURNAL} has the layers of all.")
    return notes


def _details(event: Event) -> dict[str, Any]:
    return {
        "title": f"the teleport before step {event['step']}, {event.get('method', '')}",
        "layers": [_layer_row(layer) for layer in event.get("layers", [])],
        "symmetries": [_symmetry_row(symmetry) for symmetry in event.get("symmetries", [])],
    }


def _layer_row(layer: dict[str, Any]) -> list[str]:
    room = "" if layer.get("null_dim") is None else f"{layer['null_dim']} of {layer.get('input_dim')}"
    moved_by = "unknown" if layer.get("moved_by") is None else f"{layer['moved_by']:.4g}"
    shape = " x ".join(map(str, layer.get("shape", [])))
    return [layer["name"], layer.get("role", ""), shape, room, moved_by, layer.get("reason", "")]


def _symmetry_row(symmetry: dict[str, Any]) -> list[str]:
    size = f"{symmetry['blocks']} x {symmetry['size']}"
    measured = [misalignment(symmetry), angle(symmetry)]
    return [symmetry["name"], symmetry["kind"], size, count(symmetry["weights"]), *measured, symmetry["reason"]]


def _changed(config: dict[str, Any]) -> list[str]:
    default = TeleportConfig().to_dict()
    return [name for name, value in config.items() if name not in default or default[name] != value]


def _code(config: dict[str, Any]) -> str:
    # Text, and not a TeleportConfig: the version that wrote the file may have had other settings.
    return f"TeleportConfig({', '.join(f'{name}={config[name]!r}' for name in _changed(config))})"


# --- a comparison ---------------------------------------------------------------------------------------------------------


def _comparison(folder: Path) -> dict[str, Any]:
    from hf_teleport.lab.report import cells, columns, verdicts

    try:
        found = json.loads((folder / _COMPARISON).read_text(encoding="utf-8"))
        rows = [cells(verdict) for verdict in verdicts(found)]
        sentences, seeds, best = found["sentences"], found["seeds"], found["best_learning_rates"]
        rates, clock = found["learning_rates"], found["clock"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / _COMPARISON} is not what hf-teleport compare writes ({error!r}): start that command again."
        ) from error
    curves = folder / _CURVES
    image = {
        "light": _uri(curves.read_bytes()) if curves.exists() else "",
        "alt": "Training loss of each arm against steps, time and samples, a row for each way to choose the learning rate.",
        "caption": "Training loss; a band is a standard deviation over the seeds to either side.",
    }
    return {
        "sentences": sentences,
        "caption": f"Arms minus the baseline at its best learning rate, by {clock}; mean ± 95 % interval over {len(seeds)} seeds",
        "columns": columns(),
        "rows": rows,
        "images": [image] if image["light"] else [],
        "protocol": [
            ("Learning rates", _listed(rates)),
            ("Seeds", _listed(seeds)),
            ("Clock", clock),
            ("Best rates", "; ".join(f"{arm}: {'none' if rate is None else rate}" for arm, rate in best.items())),
        ],
    }


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# --- pictures -------------------------------------------------------------------------------------------------------------


def _drawn(draw: Draw, caption: str, alt: str, run: Outcome) -> dict[str, str] | None:
    """A picture for light pages and one for dark pages. None: there is nothing to draw."""
    found = {"caption": caption, "alt": alt}
    for name in ("light", "dark"):
        with plots.style(dark=name == "dark"):
            figure = draw(run)
            if figure is None:
                return None
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110)
        found[name] = _uri(file.getvalue())
    return found


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
