"""A callback that keeps a run's log with the time spent on training."""

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class History(TrainerCallback, ExportableState):
    """Keeps the run's log with the time spent on training. Teleports count; evaluations and checkpoints do not.

    Checkpoints save its state. `History.from_state` continues from there.

    Args:
        rows: the log so far.
        spent: seconds and CPU seconds so far.

    Attributes:
        rows: the rows of the log, each with its `step`, `seconds` and `cpu_seconds`.
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None, spent: list[float] | None = None) -> None:
        self.rows: list[dict[str, Any]] = list(rows or [])
        self._spent = list(spent or [0.0, 0.0])
        # The clocks' values when they were started. None: they are stopped.
        self._since: list[float] | None = None

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"args": {"rows": self.rows, "spent": self._elapsed()}, "attributes": {}}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._stop()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        seconds, cpu_seconds = self._elapsed()
        self.rows.append({"step": state.global_step, "seconds": seconds, "cpu_seconds": cpu_seconds, **logs})

    def _start(self) -> None:
        if self._since is None:
            self._since = _clocks()

    def _stop(self) -> None:
        self._spent, self._since = self._elapsed(), None

    def _elapsed(self) -> list[float]:
        running = [0.0, 0.0] if self._since is None else [n - s for n, s in zip(_clocks(), self._since, strict=True)]
        return [spent + r for spent, r in zip(self._spent, running, strict=True)]


def _clocks() -> list[float]:
    return [time.perf_counter(), time.process_time()]
