"""`teleports.json`: the full report of each teleport of a run, in its output folder."""

import json
import logging
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_teleport.config import TeleportConfig
from hf_teleport.report import TeleportReport
from hf_teleport.version import __version__

logger = logging.getLogger(__name__)

JOURNAL = "teleports.json"

Event = dict[str, Any]
"""`TeleportReport.to_dict()`, with its `epoch` and the `step` that it came before."""

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets")

# The training arguments that the file keeps: those that decide how a run trains, and no path, name or token.
_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
    "seed",
)


def teleports(log_history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The teleports in Trainer's log, oldest first. Each has `TeleportReport.metrics` and the `step` that it came before.

    Trainer saves its log with every checkpoint, so a resumed run has its earlier teleports.
    """
    # A callback may have added rows: without a step, or a copy of another row.
    logged = [entry for entry in log_history if "teleport/loss_before" in entry and "step" in entry]
    events = [{key.removeprefix("teleport/"): value for key, value in entry.items()} for entry in logged]
    return list({identity(event): event for event in events}.values())


class Journal:
    """The events of a run, with those from before it was resumed. It never stops a run: errors become warnings.

    Each event writes a new file and renames it, so a kill or a full disk leaves the earlier events intact.

    Attributes:
        events: oldest first.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def begin(self, folder: str | Path, log_history: Iterable[dict[str, Any]]) -> None:
        """Start a run or resume one: take over the events in the folder's file that the run's log also has.

        The file stays as it is until the next event.
        """
        known = {identity(event) for event in teleports(log_history)}
        self.events = []
        if not known:
            return
        try:
            self.events = [event for event in read(folder)["events"] if identity(event) in known]
        except FileNotFoundError:
            pass  # the run was resumed in another folder
        except (OSError, ValueError) as error:
            logger.warning(
                "%s loses the teleports from before this run was resumed: %s. Training itself is not affected. To keep them, "
                "repair the file and resume again.",
                JOURNAL,
                error,
            )

    def add(self, folder: str | Path, step: int, epoch: float | None, report: TeleportReport, about: dict[str, Any]) -> None:
        """Add an event, and write all events.

        Args:
            about: the description of the run, from the function `about`.
        """
        self.events.append({"step": step, "epoch": epoch, **report.to_dict()})
        path = Path(folder, JOURNAL)
        new = path.with_name(f"{JOURNAL}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps({**about, "events": self.events}, indent=1, default=str), encoding="utf-8")
            new.replace(path)
        except OSError as error:
            logger.warning(
                "The teleport before step %d is not in %s, which cannot be written: %s. Training goes on. Make room there, and "
                "the next teleport writes this one too.",
                step,
                path,
                error,
            )
            with suppress(OSError):
                new.unlink(missing_ok=True)


def about(model: Any, args: Any, config: TeleportConfig, settled: TeleportConfig | None = None) -> dict[str, Any]:
    """The description of a run in the file, as plain values: everything but its events.

    Args:
        settled: the settings that method 'auto' chose, if the method was 'auto'.
    """
    training = {name: getattr(args, name, None) for name in _TRAINING}
    return {
        "model": type(model).__name__.removeprefix("FSDP"),  # FSDP2 adds the prefix to the class
        "versions": {
            "hf_teleport": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "config": config.to_dict(),
        "settled": None if settled is None else settled.to_dict(),
        # For an enumeration, its value.
        "training": {name: getattr(value, "value", value) for name, value in training.items()},
    }


def read(folder: str | Path) -> dict[str, Any]:
    """Read a run's file: `model`, `versions`, `config`, `settled`, `training`, and `events`, a list of `Event`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or has no events.
    """
    path = Path(folder, JOURNAL)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, or give the file that the run wrote.") from error
    if not isinstance(found, dict) or not _are_events(found.get("events")):
        raise ValueError(f"{path} has no events, each with its step and seconds: delete it, or give the file that the run wrote.")
    return found


def identity(event: Event) -> tuple[Any, Any]:
    """A key that is unique to an event, in the file and in a run's log. No two events take exactly the same time."""
    return event["step"], event.get("seconds")


def _are_events(events: Any) -> bool:
    return isinstance(events, list) and all(isinstance(event, dict) and {"step", "seconds"} <= event.keys() for event in events)
