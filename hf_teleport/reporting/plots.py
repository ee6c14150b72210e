"""Pictures of a run and its teleports, as matplotlib figures. Each function returns None if there is nothing to draw."""

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from hf_teleport.journal import Event
from hf_teleport.reporting.extras import require_extra

# For heat maps: inches for a row, and how many rows and columns can have a name each.
_ROW, _NAMED_ROWS, _NAMED_COLUMNS = 0.17, 200, 24

# The height of a screen in inches.
_SCREEN = 7.0

# The colour of a dark page.
_DARK = "#0d1117"

# How many characters of a layer's dotted name fit beside a row. The end of a name says most.
_LONGEST_NAME = 48


def style(dark: bool) -> AbstractContextManager[Any]:
    """Make figures for a dark page, or for a light one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    page = {"figure.facecolor": _DARK, "axes.facecolor": _DARK, "savefig.facecolor": _DARK}
    return require_extra("matplotlib.style").context(["dark_background", page] if dark else "default")


def scale_of(values: Iterable[float]) -> str:
    """'log' for numbers over more than a power of ten, else 'linear': its marks are easier to read within one."""
    finite = [value for value in values if math.isfinite(value)]
    return "log" if finite and max(finite) > 10 * min(finite) > 0 else "linear"


def training(log_history: list[dict[str, Any]], events: list[Event]) -> Any:
    """Loss and gradient norm against steps, one above the other, with a line at each teleport.

    Args:
        log_history: as Trainer's state has it; training loss, evaluation losses and gradient norms are drawn.
        events: as `journal.read` returns them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed, as in all functions here.
    """
    losses = {"loss": "training loss"} | {
        name: name.replace("_", " ") for row in log_history for name in row if name.startswith("eval_") and name.endswith("loss")
    }
    panels = {"loss": losses, "gradient norm": {"grad_norm": "gradient norm"}}
    drawn = {
        title: series
        for title, names in panels.items()
        if (series := {label: points for name, label in names.items() if (points := _points(log_history, name))})
    }
    if not drawn:
        return None
    figure = _figure(8, 2.6 * len(drawn) + 0.4)
    for axes, (title, series) in zip(figure.subplots(len(drawn), sharex=True, squeeze=False).flat, drawn.items(), strict=True):
        for label, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, linewidth=1.2, label=label)
        axes.set_yscale(scale_of(value for points in series.values() for _, value in points))
        _mark(axes, events)
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    axes.set_xlabel("step")
    return figure


def null_dimensions(events: list[Event]) -> Any:
    """Heat map, layers by events: the null space's share of a layer's input dimensions, from 0 to 1."""

    def value(layer: dict[str, Any]) -> float | None:
        return layer["null_dim"] / layer["input_dim"] if layer.get("input_dim") else None

    return _heat_map(events, value, "null dimensions / input dimensions", {"vmin": 0, "vmax": 1})


def captured(events: list[Event]) -> Any:
    """Heat map, layers by events: the share of a layer's input energy outside its null space. At an energy threshold of
    1 it is 1 everywhere, and nothing is drawn.
    """
    shares = [layer.get("captured") for event in events for layer in event.get("layers", [])]
    least = min((share for share in shares if share is not None), default=1.0)
    if least == 1:
        return None
    label = "input energy outside the null space (variance captured)"
    return _heat_map(events, lambda layer: layer.get("captured"), label, {"vmin": least, "vmax": 1})


def movement(events: list[Event]) -> Any:
    """Heat map, layers by events: how far each weight moved, ||W' - W|| / ||W||, on a logarithmic scale; blank: it did not."""
    colors = require_extra("matplotlib.colors")
    # A single number gives no scale.
    lengths = [layer.get("moved_by") for event in events for layer in event.get("layers", [])]
    found = [length for length in lengths if length] or [1.0]
    scale = colors.LogNorm(min(found) / 1.01, max(found) * 1.01)
    return _heat_map(events, lambda layer: layer.get("moved_by") or None, "||W' - W|| / ||W||", {"norm": scale})


def misalignment(events: list[Event]) -> Any:
    """For each change of basis, the misalignment of each symmetry that was measured: a row for each, a mark for each event."""
    measured = [
        (event["step"], {f"{s['kind']} {s['name']}": s["misalignment"] for s in symmetries if s["misalignment"] is not None})
        for event in events
        if (symmetries := event.get("symmetries"))
    ]
    rows = list(dict.fromkeys(name for _, values in measured for name in values))
    if not rows:
        return None
    figure = _figure(8, 1.2 + _ROW * min(len(rows), 2 * _NAMED_ROWS))
    axes = figure.subplots()
    for step, values in measured:
        axes.plot(list(values.values()), [rows.index(name) for name in values], "o", markersize=4, label=f"before step {step}")
    _name_rows(axes, rows)
    axes.invert_yaxis()
    axes.set(xlabel="misalignment: share of the second moment that is off the diagonal", xlim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    return figure


def misalignment_over_run(events: list[Event]) -> Any:
    """Misalignment against steps, a curve for each kind of symmetry: at each change of basis the value before and after it.

    It falls at an event and grows until the next, dashed. Each block counts once. Events that turned nothing have one value.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for kind, before, after in _by_kind(event):
            stays = event.get("rolled_back") or not event.get("steps", 1)
            curves.setdefault(kind, []).extend((event["step"], value) for value in ((before,) if stays else (before, after)))
    if not curves:
        return None
    figure = _figure(8, 3)
    axes = figure.subplots()
    for i, (kind, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "--", marker="o", markersize=4, linewidth=1, color=f"C{i}", label=kind)
        for (step, before), (next_step, after) in itertools.pairwise(points):
            if step == next_step:
                axes.plot([step, step], [before, after], color=f"C{i}", linewidth=2)
    axes.set(xlabel="before step", ylabel="misalignment", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    return figure


def _by_kind(event: Event) -> list[tuple[str, float, float]]:
    """For each kind of symmetry that an event measured the misalignment before and after, a mean over blocks."""
    measured = [s for s in event.get("symmetries", []) if s.get("misalignment_after") is not None]
    found = []
    for kind in dict.fromkeys(s["kind"] for s in measured):
        own = [s for s in measured if s["kind"] == kind]
        blocks = sum(s["blocks"] for s in own)
        before, after = (sum(s[n] * s["blocks"] for s in own) / blocks for n in ("misalignment", "misalignment_after"))
        found.append((kind, before, after))
    return found


def _figure(width: float, height: float) -> Any:
    # Made without pyplot, which would keep it in memory and may want a display.
    return require_extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    numbers = [row for row in rows if "step" in row and isinstance(row.get(name), float | int)]
    return [(row["step"], row[name]) for row in numbers if math.isfinite(row[name])]


def _mark(axes: Any, events: list[Event]) -> None:
    """A vertical line at each event: dashed, dotted if it was undone. Only one event of each kind has a legend entry."""
    methods = list(dict.fromkeys(event.get("method") for event in events))
    named = set()
    for event in events:
        undone, method = bool(event.get("rolled_back")), event.get("method")
        label = f"teleport, {method}{', undone' if undone else ''}"
        # The first colours belong to the losses. Methods before the same step have dashes with different gaps.
        index = methods.index(method)
        dashes = (4 * index, (4, 4 * max(1, len(methods) - 1)))
        look = {"linestyle": ":" if undone else dashes, "color": f"C{3 + index}", "linewidth": 1.2}
        axes.axvline(event["step"], label="_" if label in named else label, **look)
        named.add(label)


def _heat_map(events: list[Event], value: Callable[[dict[str, Any]], float | None], label: str, scale: dict[str, Any]) -> Any:
    """Layers by events. A layer or an event without any value is left out.

    Args:
        value: a layer's number, or None.
        scale: of the colours.
    """
    numpy = require_extra("numpy")
    found = [(event, {layer["name"]: value(layer) for layer in event.get("layers", [])}) for event in events]
    columns = [(event, known) for event, values in found if (known := {k: v for k, v in values.items() if v is not None})]
    # In the model's order, which an event that moved only some layers does not show.
    some = {name for _, values in columns for name in values}
    rows = [name for name in dict.fromkeys(name for _, values in found for name in values) if name in some]
    if not rows:
        return None
    numbers = numpy.array([[values.get(name, math.nan) for _, values in columns] for name in rows])
    height = 1.8 + _ROW * min(len(rows), 2 * _NAMED_ROWS)
    figure = _figure(6 + min(6, 0.4 * len(columns)), height)
    axes = figure.subplots()
    image = axes.imshow(numbers, aspect="auto", interpolation="none", **scale)
    # In a picture taller than a screen the top is seen first, so the scale and the events are there too.
    figure.colorbar(image, ax=axes, shrink=min(1.0, _SCREEN / height), anchor=(0.0, 1.0))
    axes.tick_params(labeltop=height > _SCREEN)
    # With few layers it would not fit beside the colours.
    axes.set_title(label, fontsize="medium")
    _name_rows(axes, rows)
    every = math.ceil(len(columns) / _NAMED_COLUMNS)
    names = [f"{event['step']}\n{event.get('method', '')}" for event, _ in columns]
    axes.set_xticks(range(0, len(columns), every), names[::every], fontsize=7)
    axes.set_xlabel("before step")
    return figure


def _name_rows(axes: Any, rows: list[str]) -> None:
    every = math.ceil(len(rows) / _NAMED_ROWS)
    # A dollar sign would begin a formula.
    names = [(name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}").replace("$", r"\$") for name in rows]
    axes.set_yticks(range(0, len(rows), every), names[::every], fontsize=7)
