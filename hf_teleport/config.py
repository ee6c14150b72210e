"""What a user may set about teleportation, with the paper's symbols in the help.

`TeleportConfig` is the single definition: `TeleportTrainingArguments` takes its fields from here, so
the command line, a YAML file and plain Python all speak of the same settings.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

SYMMETRIES = ("stream", "value_output", "query_key", "chain", "scaling")


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TeleportConfig:
    """Settings of teleportation (arXiv 2502.11362, Algorithm 1).

    Raises:
        ValueError: a value outside its allowed set; the message names the field, the value and what is allowed.
    """

    epochs: list[int] | int | str = _setting(
        1,
        "Before which epochs to teleport: a count N of first epochs (the paper: 5), or a list of epoch "
        "indices from 0. On the command line a list is written '0,2,4'. 0 or an empty list: never. A stream without "
        "length is one epoch.",
    )
    warmup_steps: int = _setting(
        0,
        "Optimizer steps to train before the first teleport may happen (the paper: 40 for CNNs). A scheduled "
        "epoch that begins earlier teleports at this step instead of at its first; one that also ends earlier does not.",
    )
    steps: list[int] | None = _setting(
        None,
        "Before which optimizer steps to teleport, counted from 0, instead of before `epochs`. On the command line "
        "'10' or '10,100'. A change of basis wants a few steps of training first: 10.",
    )
    every_steps: int | None = _setting(
        None, "From the first teleport on, teleport again after this many optimizer steps. None: do not."
    )
    num_batches: int = _setting(8, "Teleport batches in one event (the paper's b, 32 there).")
    batch_size: int | None = _setting(
        None, "Samples in a teleport batch (the paper's n). Default: the training batch size of one device."
    )
    steps_per_batch: int = _setting(8, "Ascent steps on each teleport batch (the paper's t).")
    learning_rate: float = _setting(0.02, "Length of an ascent step (the paper's eta); what it multiplies is set by `step_size`.")
    step_size: Literal["relative", "fixed"] = _setting(
        "relative",
        "'relative': each step is `learning_rate` times the norm of the weights that move. "
        "'fixed': each step is `learning_rate` times the projected gradient, as in the paper.",
    )
    energy_threshold: float | None = _setting(
        1.0,
        "Share tau in (0, 1] of a layer's input energy whose directions are kept untouched. "
        "1: the exact null space, the loss on the teleport data does not change. None: the lowest of 0.99, 0.999, 0.9999 and 1 "
        "at which a random move as long as a step changes the loss by no more than max_loss_change (scope 'joint').",
    )
    grad_norm_cap: float | None = _setting(
        None,
        "Go on to the next teleport batch when the gradient norm on this one passes this value (the paper's CAP). None: never.",
    )
    max_growth: float | None = _setting(
        2.0, "Go on to the next teleport batch when the gradient norm on this one has grown by this factor. None or inf: never."
    )
    max_loss_change: float | None = _setting(
        0.01,
        "Largest relative change of the loss on the teleport data. A step beyond it is halved, then undone; "
        "an event that ends beyond it is undone. None or inf: no limit, as in the paper.",
    )
    rehearsal_steps: int = _setting(
        0,
        "Keep an event only if so many of the optimizer's next steps, rehearsed on the teleport batches, end at a lower loss on "
        "the batch held back than they do without it. 0: keep it unseen.",
    )
    budget: float | None = _setting(
        0.05,
        "For method 'auto', the largest share of the run's passes that teleports may take; steps and batches of an event are cut "
        "to it, and if that is not enough there is none. None or inf: no limit.",
    )
    scope: Literal["joint", "batch"] = _setting(
        "joint",
        "'joint': one null space, of all teleport batches together. 'batch': a new null space for each "
        "batch, as in the paper; later batches then break what earlier ones kept.",
    )
    hessian: Literal["fast", "exact"] = _setting(
        "fast",
        "'fast': Hessian-vector products by one forward at shifted weights. 'exact': by double backward, the reference.",
    )
    objective: Literal["grad_norm", "predicted_decrease", "lookahead", "sharpness", "curvature"] = _setting(
        "grad_norm",
        "What method 'null_space' climbs. 'grad_norm': half the squared gradient norm (the paper). 'predicted_decrease': the "
        "decrease of the loss that the optimizer's own next step predicts. 'lookahead': minus another batch's loss after that "
        "step; needs no cap, and stops by itself. 'sharpness': minus the mean loss around the weights; 'curvature': minus the "
        "curvature along the gradient. All but the first shorten a step until it gains, and end a batch's turn when none does.",
    )
    radius: float = _setting(
        0.05, "How far the objectives 'sharpness' and 'curvature' look around, as a share of the norm of the weights."
    )
    control: Literal["random_move", "matched_rate"] | None = _setting(
        None,
        "Instead of the teleport, what a sceptic would try. 'random_move': in each layer's null space a random move as long as "
        "the teleport's. 'matched_rate': the weights stay, and until the next epoch the learning rate is multiplied by what the "
        "teleport would have multiplied the gradient norm by.",
    )
    method: Literal["auto", "null_space", "basis", "level_set", "symmetry", "null_space+basis"] = _setting(
        "auto",
        "'null_space': climb inside the null space of every layer's inputs (the paper). 'basis': turn the model's exact "
        "symmetries to where Adam works best. 'auto': 'basis' where it suits model and optimizer; else 'null_space' with "
        "objective 'lookahead', within `budget`, and kept only if a rehearsal of the next steps lands lower (why: "
        "docs/when.md); without an optimizer plain 'null_space'. 'level_set': climb "
        "in all weights along the level set of the losses, kept to first order and guarded by a line search (arXiv 2403.03362). "
        "'symmetry': climb over groups that act on adjacent layers of an MLP whose activation has an inverse (arXiv 2205.10637). "
        "'null_space+basis': one after the other.",
    )
    basis: Literal["gradient", "predicted_decrease", "activation", "random", "identity"] = _setting(
        "gradient",
        "For method 'basis', where to turn: 'gradient': eigenvectors of the gradients' second moment; 'predicted_decrease': a "
        "rotation that climbs ||g||_1; 'activation': eigenvectors of what the weights read; 'random', 'identity': controls.",
    )
    symmetries: list[str] = _setting(
        ["stream", "value_output", "query_key", "chain"],
        "For method 'basis', which symmetries to turn: 'stream' (residual stream), 'value_output' and 'query_key' (in each "
        "head), 'chain' (two weights with nothing between, LoRA's for instance), 'scaling' (balance gated and ReLU units).",
    )
    second_moment: Literal["factors", "turn", "keep", "measure"] = _setting(
        "factors",
        "For method 'basis', the optimizer's averages of squared gradients: 'turn' them by the squared rotation, or 'measure' "
        "them on the teleport batches.",
    )
    optimizer_state: Literal["keep", "reset"] = _setting(
        "keep",
        "What the optimizer remembers of the weights that a teleport may move: 'keep' it (a change of basis turns it along), or "
        "'reset' it, as for new weights.",
    )
    blocking_gains: Literal["leave", "hold", "round"] = _setting(
        "leave",
        "For method 'basis', what to do about a norm's gain that stops the residual stream from turning because it can't be "
        "folded (tied embeddings, post-norm), once training has made it uneven: 'leave' the stream (with method 'auto': hold); "
        "'hold' such gains untrained until the first teleport; 'round' them to their mean at the teleport, a change of the loss, "
        "under `max_loss_change`.",
    )
    min_misalignment: float = _setting(
        0.0,
        "For method 'basis', leave an event out if no symmetry's second moment has this share of its squares off the diagonal "
        "(0 to 1). With `every_steps`: turn again only when the basis has grown old.",
    )
    target_modules: list[str] | str | None = _setting(
        None,
        "Layers that may move, by PEFT's conventions: a list of names or name endings, a regular expression that "
        "matches the whole name, or 'all-linear' (everything but the output head). Default: all.",
    )
    exclude_modules: list[str] | str | None = _setting(
        None, "Layers that may not move: a list of names or name endings, or a regular expression."
    )
    seed: int = _setting(0, "Seed of the teleport batches. Training's own random numbers are not touched.")

    def __post_init__(self) -> None:
        self.epochs = parse_epochs(self.epochs)
        self.steps = parse_steps(self.steps)
        if self.every_steps is not None:
            self.every_steps = _integer("every_steps", self.every_steps)
        self.symmetries = _words("symmetries", self.symmetries)
        # YAML reads 1e-3 (no dot) as a string, so numbers are converted here.
        for name in ("learning_rate", "min_misalignment", "radius"):
            setattr(self, name, _number(name, getattr(self, name)))
        for name in ("energy_threshold", "grad_norm_cap", "max_growth", "max_loss_change", "budget"):
            setattr(self, name, _limit(name, getattr(self, name)))
        for name in ("warmup_steps", "num_batches", "steps_per_batch", "rehearsal_steps", "seed"):
            setattr(self, name, _integer(name, getattr(self, name)))
        if self.batch_size is not None:
            self.batch_size = _integer("batch_size", self.batch_size)
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, _modules(name, getattr(self, name)))
        tau, joint = self.energy_threshold, self.scope == "joint" and self.step_size == "relative"
        allowed = "0 < tau <= 1" + (", or None" if joint else " (None: with scope 'joint' and step_size 'relative')")
        _require(joint if tau is None else 0 < tau <= 1, "energy_threshold", tau, allowed)
        for name in ("learning_rate", "radius"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("warmup_steps", "rehearsal_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("num_batches", "steps_per_batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more, or None")
        for name in ("grad_norm_cap", "max_loss_change", "budget"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "a positive number, or None")
        _require(self.max_growth is None or self.max_growth > 1, "max_growth", self.max_growth, "a number above 1, or None")
        _require(self.every_steps is None or self.every_steps >= 1, "every_steps", self.every_steps, "1 or more, or None")
        _require(0 <= self.min_misalignment <= 1, "min_misalignment", self.min_misalignment, "0 to 1")
        unknown = [kind for kind in self.symmetries if kind not in SYMMETRIES]
        _require(bool(self.symmetries) and not unknown, "symmetries", self.symmetries, f"some of {', '.join(SYMMETRIES)}")
        if self.control == "":
            self.control = None
        for setting in fields(self):
            choices = _choices(setting.type)
            value = getattr(self, setting.name)
            _require(not choices or value in choices, setting.name, value, "one of " + ", ".join(map(repr, choices)))

        alone = self.method == "null_space" and self.scope == "joint"
        _require(self.control is None or alone, "control", self.control, "None, but with method 'null_space' and scope 'joint'")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TeleportConfig":
        """Build from a mapping, for instance one read from YAML.

        Raises:
            ValueError: an unknown key, with the nearest known one, or a value that is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key.removeprefix("teleport_"), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown teleport setting {key!r}; {hint}Known: {', '.join(known)}.")
        return cls(**settings)

    def each_method(self) -> list["TeleportConfig"]:
        """The same settings once for each method of an event, in order."""
        return [replace(self, method=name) for name in self.method.split("+")]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain Python values."""
        return asdict(self)

    def as_python(self) -> str:
        """The call that makes these settings, those that are the default left out."""
        default = TeleportConfig()
        changed = [s.name for s in fields(self) if getattr(self, s.name) != getattr(default, s.name)]
        return f"TeleportConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    def allows(self, loss: float, reference: float) -> bool:
        """Whether a loss is as near to a reference as `max_loss_change` asks."""
        limit = self.max_loss_change
        return limit is None or abs(loss - reference) <= limit * abs(reference)


# For help() and the reference: every setting has its text in one place.
TeleportConfig.__doc__ = f"{cleandoc(TeleportConfig.__doc__ or '')}\n\nAttributes:\n" + "\n".join(
    f"    {setting.name}: {setting.metadata['help']}" for setting in fields(TeleportConfig)
)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of one that may be None; empty: it is none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inside = [choice for part in get_args(annotation) if get_origin(part) is Literal for choice in get_args(part)]
    return (*inside, None) if inside else ()


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}.")


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    _require(math.isfinite(number), name, value, "a finite number")
    return number


def _limit(name: str, value: Any) -> float | None:
    """A number, or None for no limit, which on the command line is 'inf'."""
    if value is None or str(value).lower() in ("inf", "none"):
        return None
    return _number(name, value)


def _integer(name: str, value: Any) -> int:
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: a whole number.") from None


def _words(name: str, value: Any) -> list[str]:
    """A list of words; on the command line and in YAML also one text with commas."""
    _require(isinstance(value, Iterable), name, value, "a list of words")
    return [word.strip() for part in ([value] if isinstance(value, str) else value) for word in str(part).split(",")]


def _modules(name: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{name} = {value!r} is not allowed: as a regular expression it fails, {error}.") from None
        return value
    _require(isinstance(value, Iterable) and all(isinstance(v, str) for v in value), name, value, "a list of names, or a text")
    return list(value)


def parse_steps(steps: list[int] | int | str | None) -> list[int] | None:
    """'10,100', '10', 10 and [10, 100] are lists of steps; None and an empty text are none."""
    if steps is None or (isinstance(steps, str) and steps.strip().lower() in ("", "none")):
        return None
    if isinstance(steps, str):
        numbers: Iterable[Any] = [part for part in steps.strip("[] ").split(",") if part.strip()]
    else:
        numbers = steps if isinstance(steps, Iterable) else [steps]
    parsed = sorted({_integer("steps", number) for number in numbers})
    _require(all(number >= 0 for number in parsed), "steps", steps, "optimizer steps from 0, for instance '10,100'")
    return parsed


def parse_epochs(epochs: list[int] | int | str) -> list[int] | int:
    """'5' is a count; '0,2,4' and '[0]' are lists of epoch indices."""
    parsed: list[int] | int
    try:
        if isinstance(epochs, str):
            text = epochs.strip()
            is_list = text.startswith("[") or "," in text
            numbers = [int(part) for part in text.strip("[]").split(",") if part.strip()]
            parsed = numbers if is_list else numbers[0]
        elif isinstance(epochs, Iterable):
            parsed = [operator.index(epoch) for epoch in epochs]
        else:
            parsed = operator.index(epochs)
    except (TypeError, ValueError, IndexError):
        parsed = -1
    smallest = parsed if isinstance(parsed, int) else min(parsed, default=0)
    _require(smallest >= 0, "epochs", epochs, "a count of first epochs, or a list of epoch indices from 0")
    return parsed
