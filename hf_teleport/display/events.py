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


def _change(event: Event, key: str, form: str) -> str:
    pair = [_number(event, f"{key}_{when}", form) for when in ("before", "after")]
    return " -> ".join(pair) if any(pair) else ""


def _ending(event: Event) -> str:
    return f"{event.get('stopped_because', '')}{', undone' if event.get('rolled_back') else ''}"


COLUMNS: dict[str, Callable[[Event], str]] = {
    "before step": lambda event: _number(event, "step", ",d"),
    "method": lambda event: str(event.get("method", "")),
    "loss": lambda event: _change(event, "loss", ".6g"),
    "gradient norm": lambda event: _change(event, "grad_norm", ".4g"),
    "steps": lambda event: _number(event, "steps", ",d"),
    "moved": lambda event: _number(event, "moved_share", ".0%"),
    "time": lambda event: duration(event["seconds"]) if event.get("seconds") is not None else "",
    "stopped because": _ending,
}
"""For each column, by its name, the function that makes an event's cell."""

TEXTS = ("method", "stopped because")
"""The columns that are not numbers."""


def cells(event: Event) -> list[str]:
    """An event's cell in each of `COLUMNS`."""
    return [cell(event) for cell in COLUMNS.values()]


def how_many(events: Sequence[Event]) -> str:
    """How many there are, and how many of them were undone."""
    undone = sum(bool(event.get("rolled_back")) for event in events)
    return f"{count(len(events))}{f', of which {count(undone)} undone' if undone else ''}"


def total_time(events: Sequence[Event]) -> str:
    """The total time of all events."""
    return duration(sum(event.get("seconds") or 0.0 for event in events))
