"""A run's teleports as one table, a row for each: in the terminal, and in the HTML report."""

import sys
from collections.abc import Sequence
from typing import Any

from hf_teleport.journal import Event

COLUMNS = (
    "before step", "method", "loss before", "loss after", "gradient norm before", "gradient norm after", "growth", "steps kept",
    "weights moved", "seconds", "stopped because",
)  # fmt: skip

# In the terminal, where there is less room: each from the cells of one or two of those above.
_SHORT = {
    "step": (0,), "method": (1,), "loss": (2, 3), "gradient norm": (4, 5), "steps": (7,), "moved": (8,), "seconds": (9,),
    "stopped because": (10,),
}  # fmt: skip
_TEXTS = ("method", "stopped because")

# Rows of a long run in the terminal: so many of the first events, and as many of the last.
_SHOWN = 10


def row(event: Event) -> list[str]:
    """Of an event the text in each of `COLUMNS`."""
    before, after = event.get("grad_norm_before"), event.get("grad_norm_after")
    return [
        str(event["step"]),
        event.get("method", ""),
        number(event.get("loss_before"), ".6g"),
        number(event.get("loss_after"), ".6g"),
        number(before, ".4g"),
        number(after, ".4g"),
        number(after / before, ".3g") if before and after is not None else "",
        number(event.get("steps"), "d"),
        number(event.get("moved_share"), ".0%"),
        number(event.get("seconds"), ".2f"),
        f"{event.get('stopped_because', '')}{', undone' if event.get('rolled_back') else ''}",
    ]


def number(value: Any, form: str, missing: str = "not finite") -> str:
    """A number as text, in a format; of None, which JSON has for what is not finite, what is to stand there."""
    return missing if value is None else format(value, form)


def count(events: Sequence[Event]) -> str:
    """How many there are, and how many of them were undone."""
    undone = sum(bool(event.get("rolled_back")) for event in events)
    return f"{len(events)}{f', of which {undone} undone' if undone else ''}"


def seconds(events: Sequence[Event]) -> float:
    """The time of all together."""
    return sum(event.get("seconds") or 0.0 for event in events)


def table(events: Sequence[Event]) -> Any:
    """A rich table; of more than 20 events the first and the last 10."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=f"Teleports: {count(events)}; {seconds(events):.2f} s", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    for name in _SHORT:
        made.add_column(name, justify="left" if name in _TEXTS else "right", overflow="fold")
    rows = [[" -> ".join(cells[i] for i in places) for places in _SHORT.values()] for cells in map(row, events)]
    for cells in rows if len(rows) <= 2 * _SHOWN else [*rows[:_SHOWN], ["..."], *rows[-_SHOWN:]]:
        made.add_row(*cells)
    return made


def console(width: int = 140) -> Any:
    """A rich console.

    Args:
        width: columns, where the output is no terminal.
    """
    from rich.console import Console

    # A pipe has no width of its own, and a table cut to 80 columns says little.
    return Console() if sys.stdout.isatty() else Console(width=width)
