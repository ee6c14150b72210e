"""Compare teleports with the same optimizer at its best learning rate. docs/compare.md has the protocol.

It takes the settings of an experiment whose arm `baseline` does not teleport, and has two stages:

1. Train every arm at every learning rate with the first seed. An arm's best rate has the lowest final training loss.
2. Train with all seeds: the baseline at its best rate, every other arm at that rate and at its own best rate, and the controls.

With the key `tune` (tuning.py) the first stage searches more settings than the learning rate. The second stage then compares
each arm, with its controls, at its own best settings.

Two keys belong to this module:

    controls: some of 'warmup', 'random_move', 'identity' and 'matched_rate'; default: all that suit the arms; []: none
    clock: 'seconds' or 'cpu_seconds', the time that is compared; CPU time suits one process on a CPU that has other work
"""

from dataclasses import dataclass, replace
from typing import Any

from hf_teleport.arguments import TeleportTrainingArguments
from hf_teleport.lab.plot import Choices
from hf_teleport.lab.results import best_rates, evaluations
from hf_teleport.lab.runs import execute, from_first
from hf_teleport.lab.settings import Experiment, Settings, arms_of, plan
from hf_teleport.lab.tuning import Setup, check, experiment, tune
from hf_teleport.lab.verdict import CLOCKS, Verdict, verdict

BASELINE = "baseline"
CONTROLS = ("warmup", "random_move", "identity", "matched_rate")

AT_BASELINES, AT_OWN = "the baseline's best learning rate", "each arm's best learning rate"
AT_TUNED = "each arm's best settings"

# Learning rate schedules without a warm-up, and the schedules that replace them.
_WITH_WARMUP = {"constant": "constant_with_warmup", "reduce_lr_on_plateau": None}


@dataclass(frozen=True)
class Protocol:
    """The runs that may be needed.

    Attributes:
        whole: every arm and every control at every learning rate with every seed.
        arms: names of the arms without the controls, the baseline first.
        rates, seeds: learning rates and seeds of the grid.
        clock: name of the column with the time.
    """

    whole: Experiment
    arms: list[str]
    rates: list[float]
    seeds: list[int]
    clock: str

    def grid(self) -> Experiment:
        """The runs of the first stage."""
        return replace(self.whole, runs=[r for r in self.whole.runs if r.arm in self.arms and r.seed == self.seeds[0]])

    def best(self, frame: Any) -> dict[str, float | None]:
        """For each arm, the learning rate with the lowest final training loss of the first seed. None: it always diverged.

        Args:
            frame: the result of `results.evaluations`.
        """
        found = best_rates(_of(frame, self.grid()))
        return {arm: found.get(arm) for arm in self.arms}

    def second(self, best: dict[str, float | None]) -> Experiment:
        """The runs of both stages, so that a progress bar counts all of them."""
        chosen = {pair for rates in self.choices(best).values() for pair in rates.items()}
        first = {(r.arm, r.learning_rate, r.seed) for r in self.grid().runs}
        runs = [r for r in self.whole.runs if (r.arm, r.learning_rate) in chosen or (r.arm, r.learning_rate, r.seed) in first]
        return replace(self.whole, runs=runs)

    def choices(self, best: dict[str, float | None]) -> Choices:
        """The learning rates at which arms are compared.

        Args:
            best: each arm's best rate. None: it always diverged.
        """
        rate = best[BASELINE]
        if rate is None:
            raise ValueError(f"the baseline diverges at each of learning_rates = {self.rates}: give smaller ones.")
        everything = dict.fromkeys(r.arm for r in self.whole.runs)
        order = [*self.arms, *(arm for arm in everything if arm not in self.arms)]
        return {
            AT_BASELINES: dict.fromkeys(order, rate),
            AT_OWN: {arm: own for arm, own in best.items() if own is not None},
        }

    def remarks(self, best: dict[str, float | None]) -> list[str]:
        """Warnings about the grid of learning rates, for arms whose best rate may lie outside."""
        return [f"{arm}: {remark}" for arm in self.arms if (remark := _remark(best[arm], self.rates))]


@dataclass(frozen=True)
class Comparison:
    """The outcome of a protocol.

    Attributes:
        frame: the result of `results.evaluations`, for its own runs only.
        best: each arm's best learning rate. None: it always diverged.
        choices: the learning rates at which arms are compared.
        verdicts: one for each arm and rate, the baseline's own first.
        remarks: warnings about the grid of learning rates, or a line about each search.
    """

    protocol: Protocol
    frame: Any
    best: dict[str, float | None]
    choices: Choices
    verdicts: list[Verdict]
    remarks: list[str]


def protocol(settings: Settings) -> Protocol:
    """Check all settings, also those of the controls, and plan the runs.

    Raises:
        ValueError: as `settings.plan`. Or: there is no baseline, it teleports, or there is no other arm; runs are not evaluated
            during training; a control or the clock is unknown.
        FileNotFoundError: as `Workload`.
    """
    settings = {"eval_on_start": True, **settings}
    arms = {run.arm: run.training for run in plan(settings).runs}
    _check_arms(arms)
    if settings.get("tune") is not None:
        check(settings)
    clock = settings.get("clock", CLOCKS[0])
    if clock not in CLOCKS:
        raise ValueError(f"clock = {clock!r} is not allowed; allowed: one of {list(CLOCKS)}.")
    training = arms[BASELINE]
    if clock == "cpu_seconds" and (training.world_size > 1 or training.device.type != "cpu"):
        raise ValueError("clock = 'cpu_seconds' is not allowed with several processes or an accelerator; allowed: 'seconds'.")
    controls = _controls(settings.get("controls"), arms)
    if taken := sorted(arms.keys() & controls.keys()):
        raise ValueError(f"arm {taken[0]!r} is not allowed, because it is a control's name; allowed: another, or fewer controls.")
    given = arms_of(settings)
    changed = {name: {**given[arm], **own} for name, (arm, own) in controls.items()}
    whole = plan({**settings, "arms": {BASELINE: given[BASELINE], **given, **changed}})
    return Protocol(
        replace(whole, settings={**settings, "arms": given}),
        [BASELINE, *(arm for arm in arms if arm != BASELINE)],
        list(dict.fromkeys(run.learning_rate for run in whole.runs)),
        list(dict.fromkeys(run.seed for run in whole.runs)),
        clock,
    )


def compare(made: Protocol) -> Comparison:
    """Carry out the unfinished runs of a protocol, and judge the arms.

    Raises:
        FileNotFoundError, ValueError: as `runs.execute`. ValueError also if the baseline diverges at every learning rate.
        ModuleNotFoundError: a library of the experiments is not installed.
    """
    if made.whole.settings.get("tune") is not None:
        return _compare_tuned(made)
    execute(made.grid())
    best = from_first(lambda: made.best(evaluations(made.whole.output)))
    second = made.second(best)
    execute(second)
    frame = from_first(lambda: _of(evaluations(made.whole.output), second))
    choices = made.choices(best)
    reference = (BASELINE, choices[AT_BASELINES][BASELINE])
    pairs = dict.fromkeys(pair for rates in choices.values() for pair in rates.items())
    verdicts = [verdict(frame, reference, pair, made.clock) for pair in pairs]
    return Comparison(made, frame, best, choices, verdicts, made.remarks(best))


def _compare_tuned(made: Protocol) -> Comparison:
    """Compare each arm at its own best settings, and each control at the best settings of its arm."""
    found = tune(made.whole, made.arms)
    setups = {arm: setup for arm, (setup, _) in found.items()}
    training = {run.arm: run.training for run in experiment(made.whole, list(setups.values()), made.seeds[:1]).runs}
    by_arm = {arm: training[setup.name] for arm, setup in setups.items()}
    for name, (arm, own) in _controls(made.whole.settings.get("controls"), by_arm).items():
        of = setups[arm]
        setups[name] = Setup(name, f"{of.name}.{name.rpartition('.')[2]}", of.learning_rate, of.own | own)
    second = experiment(made.whole, list(setups.values()), made.seeds)
    execute(second)
    names = {setup.name: name for name, setup in setups.items()}
    frame = from_first(lambda: _of(evaluations(made.whole.output), second).replace({"arm": names}))
    rates = {name: setup.learning_rate for name, setup in setups.items()}
    verdicts = [verdict(frame, (BASELINE, rates[BASELINE]), pair, made.clock) for pair in rates.items()]
    best: dict[str, float | None] = {arm: rates[arm] for arm in found}
    return Comparison(made, frame, best, {AT_TUNED: rates}, verdicts, [f"{arm}: {search}" for arm, (_, search) in found.items()])


def _of(frame: Any, experiment: Experiment) -> Any:
    """The rows of an experiment's runs, without other runs in the same folder."""
    kept = {(run.arm, run.learning_rate, run.seed) for run in experiment.runs}
    return frame[[row in kept for row in zip(frame["arm"], frame["learning_rate"], frame["seed"], strict=True)]]


def _remark(best: float | None, rates: list[float]) -> str | None:
    if best is None:
        return "it diverges at every learning rate of the grid: give smaller ones."
    if len(rates) == 1:
        return f"the grid has one rate alone, {best:g}: give smaller and larger ones."
    if best == min(rates):
        return f"the best rate, {best:g}, is the lowest of the grid: give smaller ones."
    if best == max(rates):
        return f"the best rate, {best:g}, is the highest of the grid: give larger ones."
    return None


def _check_arms(arms: dict[str, TeleportTrainingArguments]) -> None:
    if BASELINE not in arms:
        raise ValueError(f"arms = {list(arms)} is not allowed; allowed: one of them is {BASELINE!r}, with teleport_epochs: 0.")
    if _teleports(arms[BASELINE]):
        raise ValueError(f"arm {BASELINE!r} teleports, which is not allowed; allowed: teleport_epochs: 0 and no teleport_steps.")
    if len(arms) == 1:
        raise ValueError(f"arms = {list(arms)} is not allowed; allowed: one more, to compare with {BASELINE!r}.")
    for arm, training in arms.items():
        given = {"eval_strategy": training.eval_strategy.value, "eval_on_start": training.eval_on_start}
        if given["eval_strategy"] == "no" or not given["eval_on_start"]:
            raise ValueError(
                f"arm {arm!r} with {given} is not allowed; allowed: eval_strategy 'steps' or 'epoch' and eval_on_start true, "
                "because arms are compared at equal times."
            )


def _teleports(training: TeleportTrainingArguments) -> bool:
    config = training.teleport_config()
    return bool(config.epochs if config.steps is None else config.steps)


def _controls(wanted: Any, arms: dict[str, TeleportTrainingArguments]) -> dict[str, tuple[str, Settings]]:
    """For each control: the arm that it starts from, and the settings that it changes."""
    chosen = list(CONTROLS) if wanted is None else [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(chosen, list) or any(name not in CONTROLS for name in chosen):
        raise ValueError(f"controls = {wanted!r} is not allowed; allowed: some of {list(CONTROLS)}.")
    found: dict[str, tuple[str, Settings]] = {"warmup": (BASELINE, _warmup(arms[BASELINE]))}
    for arm, training in arms.items():
        if _teleports(training):
            found[f"{arm}.random_move"] = arm, _random_move(training)
            found[f"{arm}.identity"] = arm, _identity(training)
            found[f"{arm}.matched_rate"] = arm, _matched_rate(training)
    found = {name: pair for name, pair in found.items() if pair[1] and name.rpartition(".")[2] in chosen}
    if wanted is not None and (idle := [name for name in chosen if not any(n.endswith(name) for n in found)]):
        raise ValueError(f"controls = {wanted!r} is not allowed: {idle[0]!r} suits none of the arms {list(arms)}; leave it out.")
    return found


def _warmup(baseline: TeleportTrainingArguments) -> Settings:
    """The settings of the control 'warmup': a warm-up of a tenth of the run, or twice the present warm-up."""
    schedule = baseline.lr_scheduler_type.value
    steps = 0 if schedule in _WITH_WARMUP else baseline.warmup_steps
    schedule = _WITH_WARMUP.get(schedule, schedule)
    longer = 2 * steps or 0.1
    # A value below 1 is a share of the run. Doubling must not turn a share into a number of steps.
    if schedule is None or steps < 1 <= longer:
        return {}
    return {"warmup_steps": longer, "lr_scheduler_type": schedule}


def _random_move(training: TeleportTrainingArguments) -> Settings:
    if training.teleport_method == "basis":
        return {} if training.teleport_basis == "random" else {"teleport_basis": "random"}
    return {"teleport_control": "random_move"} if _has_controls(training) else {}


def _identity(training: TeleportTrainingArguments) -> Settings:
    """The settings of the control 'identity': the second moments are rebuilt, but nothing turns."""
    rebuilds = training.teleport_method == "basis" and training.teleport_second_moment in ("factors", "measure")
    return {"teleport_basis": "identity"} if rebuilds and training.teleport_basis != "identity" else {}


def _matched_rate(training: TeleportTrainingArguments) -> Settings:
    # A change of basis does not change the gradient norm, so there is no rate to match.
    return {"teleport_control": "matched_rate"} if _has_controls(training) else {}


def _has_controls(training: TeleportTrainingArguments) -> bool:
    """Whether `teleport_control` suits these settings, and the arm does not set it itself."""
    joint = training.teleport_method == "null_space" and training.teleport_scope == "joint"
    return joint and not training.teleport_control
