"""How `benchmark.py` measures: peak memory, and times of contestants that take turns."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from benchmark_contestants import Contestant
from torch.profiler import ProfilerActivity, profile, record_function

# The profiler would say when it starts and stops, and that there was memory before it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def peak_memory(contestant: Contestant, device: torch.device) -> int:
    """The most bytes that a run has allocated at once, with those of making it ready, and without all that was there before."""
    if device.type == "cuda":
        gc.collect()  # what is freed meanwhile would count as room
        before = torch.cuda.memory_allocated(device)
        run = contestant()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = contestant()
        with record_function("measured"):
            run()
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "measured")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    ready = sum(size for at, size in changes if at < start)
    return max(accumulate((size for at, size in changes if at >= start), initial=ready))


@dataclass
class Measured:
    """What came of one contestant.

    Attributes:
        seconds: of each round.
        steps: that an event kept; None for what is no event.
    """

    peak_bytes: int
    seconds: list[float] = field(default_factory=list)
    steps: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Course:
    """Where and how long contestants race: for `budget` seconds, and at least `fewest` rounds."""

    device: torch.device
    clock: Callable[[], float]
    budget: float
    fewest: int

    def race(
        self, contestants: Mapping[str, Contestant], held: int = 0, restore: Callable[[], None] = lambda: None
    ) -> dict[str, Measured]:
        """Each contestant's peak memory, with the bytes held before, and then the times, in turns.

        Args:
            restore: called after each run, untimed.
        """
        found = {}
        for name, contestant in contestants.items():
            found[name] = Measured(held + peak_memory(contestant, self.device))
            restore()
        runs = {name: contestant() for name, contestant in contestants.items()}
        end = time.perf_counter() + self.budget
        rounds, latest = 0, 0.0
        while rounds < self.fewest or time.perf_counter() + latest < end:
            began = time.perf_counter()
            for name, run in runs.items():
                start = self._now()
                result = run()
                found[name].seconds.append(self._now() - start)
                found[name].steps = result if isinstance(result, int) else None
                restore()
            rounds, latest = rounds + 1, time.perf_counter() - began
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()
