"""The settings in groups, by the methods that read them; `TeleportConfig` is made of these.

A setting has its type, default, help text and readers here and nowhere else. If another method begins to read a setting, or a
method stops reading it, the setting moves to another group.
"""

from dataclasses import dataclass, fields
from typing import Literal

from hf_teleport.settings.values import (
    integer,
    limit,
    modules,
    none_if_empty,
    number,
    or_none,
    parse_epochs,
    parse_steps,
    setting,
    within,
    words,
)

SYMMETRIES = ("stream", "value_output", "query_key", "chain", "scaling")

_FROM_ZERO = within(integer, lambda n: n >= 0, "0 or more")
_COUNT = within(integer, lambda n: n >= 1, "1 or more")
_COUNT_OR_NONE = within(or_none(integer), lambda n: n is None or n >= 1, "1 or more, or None")
_POSITIVE = within(number, lambda x: x > 0, "a positive number")
_POSITIVE_LIMIT = within(limit, lambda x: x is None or x > 0, "a positive number, or None")


@dataclass
class CommonSettings:
    """When to teleport, on what, which weights, and how far an event may go: every method reads these."""

    epochs: list[int] | int | str = setting(
        1,
        "Before which epochs to teleport: a count N of first epochs (the paper: 5), or a list of epoch "
        "indices from 0. On the command line a list is written '0,2,4'. 0 or an empty list: never. A stream without "
        "length is one epoch.",
        lambda _, value: parse_epochs(value),
    )
    warmup_steps: int = setting(
        0,
        "Optimizer steps to train before the first teleport may happen (the paper: 40 for CNNs). A scheduled "
        "epoch that begins earlier teleports at this step instead of at its first; one that also ends earlier does not.",
        _FROM_ZERO,
    )
    steps: list[int] | str | None = setting(
        None,
        "Before which optimizer steps to teleport, counted from 0, instead of before `epochs`. On the command line "
        "'10' or '10,100'. 'doubling': before steps 10, 20, 40, ... up to half of the run, the default of method 'basis'.",
        lambda _, value: parse_steps(value),
    )
    every_steps: int | None = setting(
        None,
        "From the first teleport on, teleport again after this many optimizer steps. None: do not.",
        _COUNT_OR_NONE,
    )
    num_batches: int = setting(8, "Teleport batches in one event (the paper's b, 32 there).", _COUNT)
    batch_size: int | None = setting(
        None,
        "Samples in a teleport batch (the paper's n). Default: the training batch size of one device.",
        _COUNT_OR_NONE,
    )
    method: Literal["auto", "null_space", "basis", "level_set", "symmetry", "null_space+basis"] = setting(
        "auto",
        "'auto': 'basis' if it suits model and optimizer, else 'null_space' with objective 'lookahead', within `budget`. The "
        "latter is kept only if a rehearsal of the next steps ends lower (why: docs/when.md). Without an optimizer 'auto' is "
        "plain 'null_space'. 'null_space': climb inside the null space of every layer's inputs (the paper); 'basis': turn the "
        "model's exact symmetries to a basis in which Adam learns faster; 'level_set': climb in all weights along the level set "
        "of the losses, kept to first order and guarded by a line search (arXiv 2403.03362); 'symmetry': climb over groups "
        "that act on adjacent layers of an MLP whose activation has an inverse (arXiv 2205.10637); 'null_space+basis': one "
        "after the other.",
    )
    max_loss_change: float | None = setting(
        0.01,
        "Largest relative change of the loss on the teleport data. A step beyond it is halved, then undone; "
        "an event that ends beyond it is undone. None or inf: no limit, as in the paper.",
        _POSITIVE_LIMIT,
    )
    rehearsal_steps: int = setting(
        0,
        "Rehearse this many of the optimizer's next steps on the teleport batches, with and without the event. Keep the event "
        "only if the loss on the batch held back ends lower with it. 0: keep it without a rehearsal.",
        _FROM_ZERO,
    )
    optimizer_state: Literal["keep", "reset"] = setting(
        "keep",
        "The optimizer's state of the weights that a teleport may move: 'keep' it (a change of basis turns it with the "
        "weights), or 'reset' it, as for new weights.",
    )
    target_modules: list[str] | str | None = setting(
        None,
        "Layers that may move, by PEFT's conventions: a list of names or name endings, a regular expression that "
        "matches the whole name, or 'all-linear' (everything but the output head). Default: all.",
        modules,
    )
    exclude_modules: list[str] | str | None = setting(
        None,
        "Layers that may not move: a list of names or name endings, or a regular expression.",
        modules,
    )
    seed: int = setting(0, "Seed of the teleport batches. Training's own random numbers are not touched.", integer)


@dataclass
class ClimbSettings:
    """How long to climb on each teleport batch: for methods that make step after step."""

    steps_per_batch: int = setting(8, "Ascent steps on each teleport batch (the paper's t).", _COUNT)
    learning_rate: float = setting(
        0.02, "Length of an ascent step (the paper's eta); `step_size` says what it multiplies.", _POSITIVE
    )
    step_size: Literal["relative", "fixed"] = setting(
        "relative",
        "'relative': each step is `learning_rate` times the norm of the weights that move. "
        "'fixed': each step is `learning_rate` times the projected gradient, as in the paper.",
    )
    grad_norm_cap: float | None = setting(
        None,
        "Go on to the next teleport batch when the gradient norm on this one passes this value (the paper's CAP). None: never.",
        _POSITIVE_LIMIT,
    )
    max_growth: float | None = setting(
        2.0,
        "Go on to the next teleport batch when the gradient norm on this one has grown by this factor. None or inf: never.",
        within(limit, lambda x: x is None or x > 1, "a number above 1, or None"),
    )


@dataclass
class ScopeSettings:
    """The teleport batches whose loss a step keeps."""

    scope: Literal["joint", "batch"] = setting(
        "joint",
        "'joint': one null space, of all teleport batches together. 'batch': a new null space for each "
        "batch, as in the paper; later batches then change the loss of earlier ones.",
    )


@dataclass
class NullSpaceSettings:
    """Settings that only method 'null_space' reads."""

    energy_threshold: float | None = setting(
        1.0,
        "Share tau in (0, 1] of a layer's input energy whose directions are kept untouched. "
        "1: the exact null space, the loss on the teleport data does not change. None: the lowest of 0.99, 0.999, 0.9999 and 1 "
        "at which a random move as long as a step changes the loss by no more than max_loss_change (scope 'joint').",
        limit,
    )
    objective: Literal["grad_norm", "predicted_decrease", "lookahead", "sharpness", "curvature"] = setting(
        "grad_norm",
        "What method 'null_space' climbs. 'grad_norm': half the squared gradient norm (the paper); 'predicted_decrease': the "
        "decrease of the loss that the optimizer's own next step predicts; 'lookahead': minus another batch's loss after that "
        "step, which needs no cap and stops by itself; 'sharpness': minus the mean loss around the weights; 'curvature': minus "
        "the curvature along the gradient. All but the first shorten a step until it gains, and go to the next batch if none "
        "does.",
    )
    hessian: Literal["fast", "exact"] = setting(
        "fast",
        "'fast': Hessian-vector products by one forward at shifted weights. 'exact': by double backward, the reference.",
    )
    radius: float = setting(
        0.05,
        "How far from the weights the objectives 'sharpness' and 'curvature' look, as a share of the weights' norm.",
        _POSITIVE,
    )
    control: Literal["random_move", "matched_rate"] | None = setting(
        None,
        "A control that replaces the teleport. 'random_move': in each layer's null space a random move as long as the "
        "teleport's; 'matched_rate': the weights stay. Until the next epoch the learning rate is multiplied by the factor by "
        "which the teleport would have grown the gradient norm.",
        none_if_empty,
    )


@dataclass
class BasisSettings:
    """Settings that only method 'basis' reads."""

    basis: Literal["gradient", "predicted_decrease", "activation", "random", "identity"] = setting(
        "gradient",
        "For method 'basis', where to turn: 'gradient': eigenvectors of the gradients' second moment; 'predicted_decrease': a "
        "rotation that climbs ||g||_1; 'activation': eigenvectors of what the weights read; 'random', 'identity': controls.",
    )
    symmetries: list[str] = setting(
        ["stream", "value_output", "query_key", "chain"],
        "For method 'basis', which symmetries to turn: 'stream' (residual stream), 'value_output' and 'query_key' (in each "
        "head), 'chain' (two weights with nothing between; LoRA has some), 'scaling' (balance gated and ReLU units).",
        within(words, lambda kinds: bool(kinds) and set(kinds) <= set(SYMMETRIES), f"some of {', '.join(SYMMETRIES)}"),
    )
    second_moment: Literal["factors", "measure", "turn", "keep"] = setting(
        "factors",
        "For method 'basis', what becomes of the optimizer's averages of squared gradients. 'factors': their sum over the "
        "coordinates that turned together stays, and each gets its share in the gathered second moments; 'measure': with shares "
        "in the squared gradients of the event's batches after the turn; 'turn': they are multiplied by the squared rotation; "
        "'keep': they stay.",
    )
    track_every: int = setting(
        5,
        "For method 'basis', gather the gradients' second moments every so many training steps. Then an event needs only one "
        "batch, to check the turn. 0: gather them from `num_batches` teleport batches.",
        _FROM_ZERO,
    )
    track_decay: float = setting(
        0.8,
        "For method 'basis', how much of the gathered second moments is left at the next look (0 to below 1). 0.8 at every fifth "
        "step: most of the weight lies on the last 25 steps.",
        within(number, lambda x: 0 <= x < 1, "0 to below 1"),
    )
    blocking_gains: Literal["leave", "hold", "round"] = setting(
        "leave",
        "For method 'basis'. With tied embeddings or post-norm, a norm's gain can't be folded, and stops the residual stream "
        "from turning once training has made it uneven. 'leave' the stream as it is (method 'auto' takes 'hold'); "
        "'hold' such gains untrained until the last teleport, or to the end if the run turns back there; 'round' them to their "
        "mean at the teleport, which changes the loss within `max_loss_change`.",
    )
    frozen_weights: Literal["stay", "turn"] = setting(
        "stay",
        "For method 'basis', what becomes of weights that are not trained (the base of adapters, frozen layers). They 'stay', "
        "and fix what they write and read; or they 'turn' in memory during training. Then adapters are saved as they fit the "
        "base that was loaded. When training ends, that base is put back bit for bit. Quantized weights stay.",
    )
    turn_back: Literal["auto", "end", "never"] = setting(
        "auto",
        "For method 'basis', whether training ends in the coordinates in which it began. Then the model can be merged with what "
        "it came from, averaged and compared. 'end': everything is turned back when training ends; outputs stay. 'never': the "
        "model stays turned; trainer.turn_back() and `hf-teleport turn-back` turn it back later. 'auto': 'end' for a model that "
        "was loaded from saved weights, 'never' for a new one.",
    )
    min_misalignment: float = setting(
        0.0,
        "For method 'basis', skip an event if no symmetry's second moment has this share of its squares off the diagonal "
        "(0 to 1). With `every_steps` this turns again only if the basis has become bad.",
        within(number, lambda x: 0 <= x <= 1, "0 to 1"),
    )


@dataclass
class AutoSettings:
    """Settings that only method 'auto' reads, beside those of 'null_space' and 'basis'."""

    budget: float | None = setting(
        0.05,
        "For method 'auto', the largest share of the run's passes that teleports may take. Steps and batches of an event are "
        "cut to it; if that is not enough there is no event. None or inf: no limit.",
        _POSITIVE_LIMIT,
    )


# Every method reads CommonSettings.
READ_BY: dict[type, tuple[str, ...]] = {
    ClimbSettings: ("null_space", "level_set", "symmetry"),
    ScopeSettings: ("null_space", "level_set"),
    NullSpaceSettings: ("null_space",),
    BasisSettings: ("basis",),
    AutoSettings: ("auto",),
}


def readers(name: str) -> tuple[str, ...]:
    """The methods that read a setting; empty: all do."""
    return next((methods for group, methods in READ_BY.items() if name in {f.name for f in fields(group)}), ())


def reads(method: str, name: str) -> bool:
    """Whether a method reads a setting: 'auto' may come to 'null_space' or 'basis', and 'null_space+basis' is both in turn."""
    parts = ("auto", "null_space", "basis") if method == "auto" else method.split("+")
    return not readers(name) or any(part in readers(name) for part in parts)
