"""What a run leaves of its teleports: `teleports.json` in its output folder, every event's whole report."""

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
"""`TeleportReport.to_dict()`, with the `step` before which it came and the `epoch`."""

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets")

# What of a run's arguments is told: what decides how it trains, and no path, name or token.
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
    """The teleports among what Trainer logged, oldest first: `TeleportReport.metrics`, and `step`, the one they came before.

    Trainer saves its log with every checkpoint, so that a resumed run has the teleports from before.
    """
    # A callback may have written rows of its own there: without a step, or the same once more.
    logged = [entry for entry in log_history if "teleport/loss_before" in entry and "step" in entry]
    events = [{key.removeprefix("teleport/"): value for key, value in entry.items()} for entry in logged]
    return list({identity(event): event for event in events}.values())


class Journal:
    """The events of a run, those before it was resumed included. It never stops a run: what fails is a warning.

    The file is written whole at each event, through a second one, so that a kill or a full disk leaves the events before.

    Attributes:
        events: oldest first.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def begin(self, folder: str | Path, log_history: Iterable[dict[str, Any]]) -> None:
        """A run begins or is resumed: go on from those events of the file in its folder that the run's log knows.

        The file itself stays as it is until the next event.
        """
        known = {identity(event) for event in teleports(log_history)}
        self.events = []
        if not known:
            return
        try:
            self.events = [event for event in read(folder)["events"] if identity(event) in known]
        except FileNotFoundError:
            pass  # a run that is resumed in another folder
        except (OSError, ValueError) as error:
            logger.warning(
                "The teleports before this run was resumed are not kept in %s: %s. The run itself is not touched; to keep them, "
                "mend the file and resume once more.",
                JOURNAL,
                error,
            )

    def add(self, folder: str | Path, step: int, epoch: float | None, report: TeleportReport, about: dict[str, Any]) -> None:
        """Keep an event, and write all of them.

        Args:
            about: the run, as `about` returns it.
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
                "The teleport before step %d is not in %s, for it cannot be written: %s. Training goes on; make room there, and "
                "the next teleport writes this one too.",
                step,
                path,
                error,
            )
            with suppress(OSError):
                new.unlink(missing_ok=True)


def about(model: Any, args: Any, config: TeleportConfig, settled: TeleportConfig | None = None) -> dict[str, Any]:
    """What the file says of a run besides its events, as plain values.

    Args:
        settled: what method 'auto' has come to, if it was that.
    """
    training = {name: getattr(args, name, None) for name in _TRAINING}
    return {
        "model": type(model).__name__.removeprefix("FSDP"),  # FSDP2 makes a class of its own of the model's
        "versions": {"hf_teleport": __version__, "python": platform.python_version(), **_versions()},
        "config": config.to_dict(),
        "settled": None if settled is None else settled.to_dict(),
        # Enumerations are told by their values.
        "training": {name: getattr(value, "value", value) for name, value in training.items()},
    }


def read(folder: str | Path) -> dict[str, Any]:
    """What a run has left: `model`, `versions`, `config`, `settled`, `training`, and `events`, a list of `Event`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what a run writes.
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
    """What tells an event from all others, in the file as in a run's log: no two take the same time."""
    return event["step"], event.get("seconds")


def _are_events(events: Any) -> bool:
    return isinstance(events, list) and all(isinstance(event, dict) and {"step", "seconds"} <= event.keys() for event in events)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}
