"""The outcome of a run, read from the files in its output folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_teleport.journal import JOURNAL, Event, identity, read, teleports

# The files with a run's log that Trainer and the experiments leave.
STATE, HISTORY = "trainer_state.json", "history.json"


@dataclass(frozen=True)
class Outcome:
    """A run, finished or not.

    Attributes:
        about: the file of its teleports, as `journal.read` returns it; empty: there is none.
        log: Trainer's `log_history`; empty: there is none.
        step, max_steps: how far it had come when it was last saved, and how far it was to go; 0: unknown.
        events: oldest first; of one that only the log knows there are no layers.
    """

    about: dict[str, Any]
    log: list[dict[str, Any]]
    step: int
    max_steps: int
    events: list[Event]


def outcome(folder: Path) -> Outcome | None:
    """What is known of a folder's run; None: there is none.

    Of several states, one in each checkpoint, it takes the furthest one. A state that an interrupt has cut short is
    skipped.

    Raises:
        ValueError: the file of the teleports is not what a run writes.
    """
    about = read(folder) if (folder / JOURNAL).exists() else {}
    states = [_json(path) for path in [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]]
    history = _json(folder / HISTORY)
    if isinstance(history, list) and history:
        states.append({"log_history": history, "global_step": max(row.get("step", 0) for row in history)})
    state = max((s for s in states if isinstance(s, dict)), key=lambda s: s.get("global_step", 0), default=None)
    if state is None:
        return Outcome(about, [], 0, 0, about["events"]) if about else None
    log, step = state.get("log_history", []), state.get("global_step", 0)
    return Outcome(about, log, step, state.get("max_steps", 0), _events(about.get("events", []), log, step))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _events(kept: list[Event], log: list[dict[str, Any]], step: int) -> list[Event]:
    """The events of the file, and the events of the log that are not in it.

    An event of the file from before the last step of the log, which the log does not know, belongs to another run.
    """
    logged = {identity(event): event for event in teleports(log)}
    own = {identity(event): event for event in kept if identity(event) in logged or event["step"] >= step}
    return sorted({**logged, **own}.values(), key=lambda event: event["step"])
