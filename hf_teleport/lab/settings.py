"""An experiment's settings: from YAML files that inherit and the words of a command line to checked runs.

The keys of a file are those of `Workload` and of its data (`data.pipelines.OPTIONS`), every field of `ExperimentArguments`
(training, teleports, optimizer, learning rates by groups of parameters), and

    base: a YAML file, or a list of them, by their paths from this one; what stands here wins, and a later one over an earlier
    arms: for each name the training arguments in which this arm differs; null drops an inherited arm
    learning_rates, seeds: every arm runs with each of them
    paper_learning_rate: the one of the rates to compare all arms at, when the results are plotted
    save_model: true keeps the model of each run, with the tokenizer of text, in `model` in the run's folder
    controls, clock: of `hf-teleport compare`, see compare.py; tune, trials: of its search, see tuning.py
    output_dir: where the runs are kept; default: runs/FOLDER/NAME of the file FOLDER/NAME.yaml

Mappings are merged key by key, everything else is replaced. A seed decides a run's initial weights, the order of its data and
its teleport batches, in every arm alike.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_teleport.lab.arguments import ExperimentArguments
from hf_teleport.lab.data.pipelines import OPTIONS
from hf_teleport.lab.keys import from_yaml, require_fit, require_known
from hf_teleport.lab.workload import Workload

Settings = dict[str, Any]

_WORKLOAD = [f.name for f in fields(Workload) if f.name != "options"]
_DATA = list(dict.fromkeys(name for names in OPTIONS.values() for name in names))
_GRID = ["arms", "learning_rates", "seeds", "paper_learning_rate", "save_model"]
_COMPARISON = ["controls", "clock", "tune", "trials"]
_TRAINING = [f.name for f in fields(ExperimentArguments) if f.init]
_REQUIRED = ["dataset", "model", "arms", "learning_rates", "seeds"]

# The grid sets these, for each run.
_OF_A_RUN = {"learning_rate": "learning_rates", "seed": "seeds", "data_seed": "seeds", "teleport_seed": "seeds"}

# These name and store a run, and do not change its outcome.
_WITHOUT_EFFECT = {"output_dir", "disable_tqdm", "report_to", "run_name", "save_strategy", "save_steps", "save_total_limit"}


@dataclass(frozen=True)
class Run:
    """One arm at one learning rate with one seed.

    Attributes:
        training: its arguments.
        settings: all that decides its outcome, in plain values.
        save_model: whether its trained model is kept.
    """

    arm: str
    learning_rate: float
    seed: int
    training: ExperimentArguments
    settings: Settings
    save_model: bool = False

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return Path(self.training.output_dir)

    def __str__(self) -> str:
        return f"{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment:
    """What to run, in this order: all arms with a seed before the next seed, so that early results compare all arms.

    Attributes:
        settings: all of them, as one YAML file could have them.
    """

    workload: Workload
    runs: list[Run]
    output: Path
    settings: Settings


def read(file: str | Path, words: Iterable[str] = ()) -> Settings:
    """The settings of a YAML file and all that it inherits, and over them those of a command line.

    Args:
        words: `--key value`, `--key=value`, `--key value value` for a list, and `--arms.name.key value` within a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no mapping, that has a key twice in one or that inherits itself, or words that are no keys and
            values.
    """
    path = Path(file)
    settings = {"output_dir": str(Path("runs", path.resolve().parent.name, path.stem)), **_inherited(path)}
    for key, value in _assignments(list(words)):
        *groups, last = key.split(".")
        nested: Any = {last: value}
        for group in reversed(groups):
            nested = {group: nested}
        settings = _merged(settings, nested)
    return settings


def plan(settings: Settings) -> Experiment:
    """Checks all settings and makes the arguments of every run.

    Raises:
        ValueError: a key that is missing, unknown, or set by the grid, or a value that is not allowed.
    """
    for key in settings:
        _require_free(key, [*_WORKLOAD, *_DATA, *_GRID, *_COMPARISON, *_TRAINING], "the settings")
    if missing := [key for key in _REQUIRED if settings.get(key) in (None, {}, [])]:
        raise ValueError(f"{missing[0]!r} is missing from the settings; needed are {', '.join(_REQUIRED)}.")
    rates = _numbers(settings, "learning_rates", float)
    seeds = _numbers(settings, "seeds", int)
    paper = settings.get("paper_learning_rate")
    if paper is not None and float(paper) not in rates:
        raise ValueError(f"paper_learning_rate = {paper!r} is not allowed; allowed: one of learning_rates = {rates}.")
    workload = Workload(
        options={key: settings[key] for key in _DATA if key in settings},
        **{key: settings[key] for key in _WORKLOAD if key in settings},
    )
    require_fit("output_dir", settings["output_dir"], ExperimentArguments)
    output = Path(settings["output_dir"])
    common = {key: settings[key] for key in _TRAINING if key in settings}
    save_model = settings.get("save_model", False)
    if not isinstance(save_model, bool):
        raise ValueError(f"save_model = {save_model!r} is not allowed; allowed: true or false.")
    runs = [
        replace(run, save_model=save_model, settings=run.settings | ({"save_model": True} if save_model else {}))
        for arm, own in arms_of(settings).items()
        for run in _runs(arm, common | own, rates, seeds, workload, output)
    ]
    return Experiment(workload, sorted(runs, key=lambda run: seeds.index(run.seed)), output, settings)


def _runs(arm: str, training: Settings, rates: list[float], seeds: list[int], workload: Workload, output: Path) -> list[Run]:
    parser = HfArgumentParser([ExperimentArguments], exit_on_error=False)
    for key, value in training.items():
        try:
            require_fit(key, value, ExperimentArguments)
        except ValueError as error:
            raise ValueError(f"arm {arm!r}: {error}") from error
    # Texts are read as on a command line; other values are taken as they are.
    parser.set_defaults(**training)
    runs = []
    for rate in rates:
        for seed in seeds:
            folder = output / arm / f"lr{rate:.12g}" / f"seed{seed}"
            own = {"learning_rate": rate, "seed": seed, "data_seed": seed, "teleport_seed": seed, "output_dir": str(folder)}
            parser.set_defaults(**own)
            try:
                (arguments,) = parser.parse_args_into_dataclasses([], look_for_args_file=False)
            except (argparse.ArgumentError, ValueError, TypeError) as error:
                raise ValueError(f"arm {arm!r}: {error}") from error
            plain = arguments.to_dict()
            decisive = {key: plain[key] for key in [*training, *own] if key not in _WITHOUT_EFFECT}
            decisive |= {"arm": arm, "processes": arguments.world_size}
            of_workload = {f.name: getattr(workload, f.name) for f in fields(Workload) if f.name != "options"} | workload.options
            # Left out as in the folders of runs from before there were such keys, which are still good.
            new = ("pretrained", None), ("adapter", None)
            decisive |= {key: value for key, value in of_workload.items() if (key, value) not in new}
            runs.append(Run(arm, rate, seed, arguments, json.loads(json.dumps(decisive))))
    return runs


def arms_of(settings: Settings) -> dict[str, Settings]:
    """The training arguments of each arm, without arms that are dropped.

    Raises:
        ValueError: a name or a key that is not allowed, or no arm.
    """
    arms = settings["arms"]
    if not isinstance(arms, dict):
        raise ValueError(f"arms = {arms!r} is not allowed; allowed: a mapping from names to training arguments.")
    kept = {str(name): own for name, own in arms.items() if own is not None}
    for name, own in kept.items():
        if not re.fullmatch(r"[\w.+-]+", name) or not isinstance(own, dict):
            raise ValueError(
                f"arm {name!r} = {own!r} is not allowed; allowed: letters, digits and _.+- in the name, which is a folder's, "
                "and a mapping of training arguments."
            )
        for key in own:
            _require_free(key, [key for key in _TRAINING if key != "output_dir"], f"arm {name!r}")
    if not kept:
        raise ValueError("arms = {} is not allowed; allowed: one arm or more.")
    return kept


def _require_free(key: str, known: list[str], where: str) -> None:
    if key in _OF_A_RUN:
        raise ValueError(f"key {key!r} in {where} is not allowed, for each run has its own; give {_OF_A_RUN[key]!r}, a list.")
    require_known(key, [name for name in known if name not in _OF_A_RUN], where)


def _numbers(settings: Settings, key: str, kind: type) -> list[Any]:
    """A list of distinct numbers, from one or several."""
    given = settings[key]
    values = given if isinstance(given, list) else [given]
    try:
        numbers = [kind(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    cut = any(isinstance(value, bool) or (kind is int and isinstance(value, float)) for value in values)
    lowest = 0 if kind is int else math.ulp(0.0)
    if not numbers or cut or len(set(numbers)) < len(numbers) or not all(lowest <= number < math.inf for number in numbers):
        allowed = "whole numbers from 0" if kind is int else "positive numbers"
        raise ValueError(f"{key} = {given!r} is not allowed; allowed: {allowed}, each once.")
    return numbers


def _inherited(path: Path, heirs: tuple[Path, ...] = ()) -> Settings:
    if path.resolve() in heirs:
        raise ValueError(f"{path} is its own base: take it out of `base`, there or in a file that it inherits from.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: give a YAML file that is there, such as those in configs.")
    try:
        own = from_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML, which is text in UTF-8; save it as such: {error}") from error
    if not isinstance(own, dict):
        found = "nothing" if own is None else f"a {type(own).__name__}"
        raise ValueError(f"{path} holds {found}, which is not allowed; allowed: a YAML file of keys and values (key: value).")
    if isinstance(own.get("arms"), dict):  # an arm may be named by a number, which is text on the command line
        own["arms"] = {str(name): arm for name, arm in own["arms"].items()}
    bases = own.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise ValueError(
            f"base = {bases!r} in {path} is not allowed; allowed: a YAML file's path from this one, or a list of them."
        )
    settings: Settings = {}
    for base in bases:
        settings = _merged(settings, _inherited(path.parent / base, (*heirs, path.resolve())))
    return _merged(settings, own)


def _merged(under: Settings, over: Settings) -> Settings:
    both = {
        key: _merged(under[key], over[key]) for key in under if isinstance(under[key], dict) and isinstance(over.get(key), dict)
    }
    return {**under, **over, **both}


def _assignments(words: list[str]) -> list[tuple[str, Any]]:
    """Keys and values from words; a training argument's value stays text, any other one is read as YAML."""
    found: list[tuple[str, Any]] = []
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--") or not key[2:]:
            raise ValueError(f"{key!r} is not allowed where a key is expected; allowed: --key value.")
        values = [value] if equals else []
        while words and not equals and not words[0].startswith("--"):
            values.append(words.pop(0))
        if not values:
            raise ValueError(f"{key} has no value; write {key} VALUE.")
        name = key[2:]
        read = values if name.rpartition(".")[2] in _TRAINING else [from_yaml(text, f"the value of {key}") for text in values]
        found.append((name, read[0] if len(read) == 1 else read))
    return found
