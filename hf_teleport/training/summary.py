"""The table of a run's teleports in the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from hf_teleport.display.events import TEXTS, Event, cells, columns, how_many, total_time

# The table of a long run has this many of its first events, and as many of its last.
_SHOWN = 10


def table(events: Sequence[Event]) -> Any:
    """A rich table. With more than 20 events it has the first and the last 10."""
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
        width: number of columns, if the output is not a terminal.
    """
    from rich.console import Console

    # A pipe has no width. rich would assume 80 columns, too few for these tables.
    return Console() if sys.stdout.isatty() else Console(width=width)
