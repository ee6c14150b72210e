"""Tune all arms equally: coordinate search over the same settings, from the same start, with the same number of trials.

Keys of a comparison's settings, docs/compare.md:

    tune: the values of each setting, for instance {learning_rate: [0.001, 0.002], adam_beta2: [0.95, 0.999]}. The search starts
        at the values that the settings have outside of `arms`. If an arm gives a setting itself, it keeps that value.
    trials: number of runs for each arm, with the first seed
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_teleport.lab.results import evaluations, final
from hf_teleport.lab.runs import execute, from_first
from hf_teleport.lab.settings import Experiment, Settings, plan

RATE = "learning_rate"
TRIALS = 12

# For these settings the search may go beyond the ends of their lists. It repeats the ratio of the last two values.
_EXTENDED = (RATE, "embedding_learning_rate")

# A learning rate counts as good if its final loss exceeds the best one by at most this share.
TOLERANCE = 0.02

Point = tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """The trials of a search.

    Attributes:
        names: the settings.
        losses: the final training loss of each point, in the order of the trials.
        ended: whether all neighbours of the best point were tried. False: the trials ran out before.
    """

    names: tuple[str, ...]
    losses: dict[Point, float]
    ended: bool

    @property
    def best(self) -> dict[str, float]:
        """The values with the lowest loss."""
        best: Point = min(self.losses, key=self.losses.__getitem__)
        return dict(zip(self.names, best, strict=True))

    @property
    def loss(self) -> float:
        """The lowest loss."""
        return min(self.losses.values())

    @property
    def good_rates(self) -> list[float]:
        """Learning rates that end within `TOLERANCE` of the best, with the other settings at their best values.

        Empty if the learning rate was not tuned.
        """
        if RATE not in self.names:
            return []
        at, best = self.names.index(RATE), tuple(self.best.values())
        alike = {p[at]: loss for p, loss in self.losses.items() if p[:at] + p[at + 1 :] == best[:at] + best[at + 1 :]}
        return sorted(rate for rate, loss in alike.items() if loss <= (1 + TOLERANCE) * self.loss)

    def __str__(self) -> str:
        said = f"best at {', '.join(f'{name} {value:g}' for name, value in self.best.items())} ({len(self.losses)} trials)"
        if not self.ended:
            return f"{said}; the trials ran out before all of its neighbours were tried: give more trials."
        good = self.good_rates
        return (
            f"{said}; learning rates from {good[0]:g} to {good[-1]:g} end within {TOLERANCE:.0%} of it." if good else f"{said}."
        )


def coordinate_search(
    loss_of: Callable[[dict[str, float]], float], axes: dict[str, list[float]], start: dict[str, float], trials: int
) -> Search:
    """Coordinate search: move to a better neighbour along one setting after the other, until there is none.

    The remaining trials explore learning rates on both sides of the best, as long as they end within `TOLERANCE` of it.

    Args:
        loss_of: returns the final loss at a point. Infinite: it diverged.
        axes: the values of each setting, in ascending order. They contain `start`.
        start: where the search begins.
        trials: the largest number of points to try.
    """
    axes = {name: list(axes[name]) for name in axes}
    best, losses = tuple(start[name] for name in axes), dict[Point, float]()

    def ask(point: Point) -> bool:
        """Try a point if trials are left. Returns whether its loss is known now."""
        if point not in losses and len(losses) < trials:
            losses[point] = loss_of(dict(zip(axes, point, strict=True)))
        return point in losses

    def found(ended: bool) -> Search:
        return Search(tuple(axes), losses, ended)

    ask(best)
    moved = True
    while moved:
        moved = False
        for name in axes:
            for direction in (1, -1):
                while (point := _neighbour(axes, best, name, direction)) is not None:
                    if not ask(point):
                        return found(False)
                    if losses[point] >= losses[best]:
                        break
                    best, moved = point, True
    if RATE in axes:
        for direction in (1, -1):
            point = best
            while (following := _neighbour(axes, point, RATE, direction)) is not None and ask(following):
                if losses[following] > (1 + TOLERANCE) * losses[best]:
                    break
                point = following
    return found(True)


def _neighbour(axes: dict[str, list[float]], point: Point, name: str, direction: int) -> Point | None:
    """The next point along one setting. None: there is none beyond the end. Lists of learning rates grow instead."""
    values, at = axes[name], list(axes).index(name)
    index = values.index(point[at]) + direction
    if not 0 <= index < len(values):
        if name not in _EXTENDED or len(values) < 2:
            return None
        if direction > 0:
            values.append(float(f"{values[-1] ** 2 / values[-2]:.6g}"))
        else:
            values.insert(0, float(f"{values[0] ** 2 / values[1]:.6g}"))
            index = 0
    return (*point[:at], values[index], *point[at + 1 :])


@dataclass(frozen=True)
class Setup:
    """An arm with certain settings.

    Attributes:
        arm: its name in the settings.
        name: the name of its runs: the arm, and the settings that differ from the start.
        learning_rate: its learning rate.
        own: its other settings: those of the arm, and those that were searched.
    """

    arm: str
    name: str
    learning_rate: float
    own: Settings


def check(settings: Settings) -> None:
    """Check the keys `tune` and `trials`.

    Raises:
        ValueError: a value is not allowed, the start is not among the values, or there are several learning rates.
    """
    trials = settings.get("trials", TRIALS)
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise ValueError(f"trials = {trials!r} is not allowed; allowed: a whole number from 1.")
    axes, start = settings["tune"], _start(settings)
    if not isinstance(axes, dict) or not axes:
        raise ValueError(f"tune = {axes!r} is not allowed; allowed: a mapping from settings to lists of their values.")
    for name, values in axes.items():
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if not numbers or numbers != sorted(set(numbers)) or (name in _EXTENDED and numbers[0] <= 0):
            raise ValueError(f"tune.{name} = {values!r} is not allowed; allowed: a list of numbers in ascending order.")
        if start.get(name) not in numbers:
            raise ValueError(
                f"{name} = {start.get(name)!r} is where the search starts; allowed: one of tune.{name} = {values}. Give it "
                f"beside `tune`{', as learning_rates' if name == RATE else ''}."
            )


def _start(settings: Settings) -> dict[str, Any]:
    rates = settings.get("learning_rates")
    rates = rates if isinstance(rates, list) else [rates]
    if len(rates) != 1:
        raise ValueError(f"learning_rates = {rates} is not allowed with `tune`; allowed: one, where the search starts.")
    return {name: _number(value) for name, value in {**settings, RATE: rates[0]}.items() if name in (settings.get("tune") or {})}


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def tune(whole: Experiment, arms: list[str]) -> dict[str, tuple[Setup, Search]]:
    """Find the best settings of every arm. Finished trials are not run again.

    Args:
        whole: the comparison's experiment, checked by `check`.
        arms: names of its arms.

    Raises:
        ValueError: an arm diverges in all of its trials. Also as `runs.execute`.
    """
    settings, seed = whole.settings, whole.runs[0].seed
    start = _start(settings)
    found = {}
    for arm in arms:
        own = settings["arms"][arm]
        axes = {name: [float(value) for value in values] for name, values in settings["tune"].items() if name not in own}

        def loss_of(point: dict[str, float], arm: str = arm) -> float:
            setup = _setup(whole, arm, point)
            execute(experiment(whole, [setup], [seed]))
            ends = from_first(lambda: final(evaluations(whole.output)))
            rows = (ends["arm"] == setup.name) & (ends["learning_rate"] == setup.learning_rate) & (ends["seed"] == seed)
            return float(ends[rows]["train_loss"].iloc[0])

        search = coordinate_search(loss_of, axes, start, settings.get("trials", TRIALS))
        if search.loss == float("inf"):
            raise ValueError(f"arm {arm!r} diverges in all of its {len(search.losses)} trials: start at a smaller learning rate.")
        found[arm] = _setup(whole, arm, search.best), search
    return found


def _setup(whole: Experiment, arm: str, point: dict[str, float]) -> Setup:
    start, own = _start(whole.settings), whole.settings["arms"][arm]
    changed = {name: value for name, value in point.items() if name != RATE}
    name = "".join([arm, *(f"+{key}-{value:g}" for key, value in changed.items() if value != start[key])])
    rate = point.get(RATE, whole.runs[0].learning_rate)
    return Setup(arm, name, rate, own | {key: _whole(value) for key, value in changed.items()})


def _whole(value: float) -> float | int:
    """A whole number as an int, because settings such as numbers of steps need one."""
    return int(value) if value >= 1 and value.is_integer() else value


def experiment(whole: Experiment, setups: list[Setup], seeds: list[int]) -> Experiment:
    """The runs of arms, each with its own settings, in the folder of the whole experiment and with its data."""
    given = ({"arms": {s.name: s.own}, "learning_rates": [s.learning_rate], "seeds": seeds} for s in setups)
    runs = [run for own in given for run in plan({**whole.settings, **own}).runs]
    return replace(whole, runs=sorted(runs, key=lambda run: seeds.index(run.seed)))
