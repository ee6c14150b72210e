"""A run's teleports as a table in the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from hf_teleport.display.events import TEXTS, Event, cells, columns, how_many, total_time

# Rows of a long run: so many of the first events, and as many of the last.
_SHOWN = 10


def table(events: Sequence[Event]) -> Any:
    """A rich table; of more than 20 events the first and the last 10."""
    from rich import box
    from rich.table import Table

    title = f"Teleports: {how_many(events)}; {total_time(events)}"
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    names = columns(events)
    for name in names:
        made.add_column(name, justify="left" if name in TEXTS else "right", overflow="fold")
    rows = [cells(event, names) for event in events]
    for row in rows if len(rows) <= 2 * _SHOWN else [*rows[:_SHOWN], ["..."], *rows[-_SHOWN:]]:
        made.add_row(*row)
    return made


def console(width: int = 140) -> Any:
    """A rich console.

    Args:
        width: columns, where the output is no terminal.
    """
    from rich.console import Console

    # A pipe has no width of its own, and a table cut to 80 columns says little.
    return Console() if sys.stdout.isatty() else Console(width=width)
