"""The one table of a run's teleports: its columns and their values. Card, terminal and HTML page render it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_teleport.display.quantities import count, duration

Event = Mapping[str, Any]
"""An event as `hf_teleport.journal` has it: `TeleportReport.metrics` or more, and the `step` before which it came."""


def _number(event: Event, key: str, form: str) -> str:
    """Blank if the event has no such number. JSON has None for a number that is not finite."""
    if key not in event:
        return ""
    value = event[key]
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def _change(event: Event, before: str, after: str, form: str) -> str:
    pair = [_number(event, key, form) for key in (before, after)]
    return " -> ".join(pair) if any(pair) else ""


def _measured(event: Event, key: str, form: str, unit: str = "") -> str:
    """Blank too where the event has not measured it."""
    return "" if event.get(key) is None else f"{_number(event, key, form)}{unit}"


def misalignment(event: Event) -> str:
    """The misalignment of an event, or of one of its symmetries, before and after; blank if it was not measured."""
    return "" if event.get("misalignment") is None else _change(event, "misalignment", "misalignment_after", ".3g")


def angle(event: Event) -> str:
    """By how much an event, or one of its symmetries, turned a coordinate on average; blank if nothing turned."""
    return _measured(event, "angle", ".0f", "°")


def _ending(event: Event) -> str:
    return f"{event.get('stopped_because', '')}{', undone' if event.get('rolled_back') else ''}"


COLUMNS: dict[str, Callable[[Event], str]] = {
    "before step": lambda event: _number(event, "step", ",d"),
    "method": lambda event: str(event.get("method", "")),
    "loss": lambda event: _change(event, "loss_before", "loss_after", ".6g"),
    "gradient norm": lambda event: _change(event, "grad_norm_before", "grad_norm_after", ".4g"),
    "misalignment": misalignment,
    "turned by": angle,
    "second moments": lambda event: _measured(event, "second_moment_moved", ".0%"),
    "steps": lambda event: _number(event, "steps", ",d"),
    "moved": lambda event: _number(event, "moved_share", ".0%"),
    "time": lambda event: duration(event["seconds"]) if event.get("seconds") is not None else "",
    "stopped because": _ending,
}
"""For each column, by its name, the function that makes an event's cell."""

OF_A_TURN = ("misalignment", "turned by", "second moments")
"""The columns that only a change of basis fills."""

TEXTS = ("method", "stopped because")
"""The columns that are not numbers."""


def columns(events: Sequence[Event]) -> list[str]:
    """The names of the columns for these events. The columns of a change of basis are left out if there was none."""
    return [name for name, cell in COLUMNS.items() if name not in OF_A_TURN or any(map(cell, events))]


def cells(event: Event, names: Sequence[str]) -> list[str]:
    """An event's cell in each of these columns."""
    return [COLUMNS[name](event) for name in names]


def how_many(events: Sequence[Event]) -> str:
    """How many there are, and how many of them were undone."""
    undone = sum(bool(event.get("rolled_back")) for event in events)
    return f"{count(len(events))}{f', of which {count(undone)} undone' if undone else ''}"


def total_time(events: Sequence[Event]) -> str:
    """The total time of all events."""
    return duration(sum(event.get("seconds") or 0.0 for event in events))
