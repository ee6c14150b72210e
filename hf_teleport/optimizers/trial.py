"""New optimizers of the kind of a given one: for one parameter, with the options of its group, as if training began."""

import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.weights.copies import copied
from hf_teleport.weights.isolation import seed_everything

Group = dict[str, Any]


def anew(part: Any, group: Group, parameter: nn.Parameter) -> Any:
    """A new optimizer like `part` for one parameter alone, with the options of a group (`at_start`)."""
    kind = type(part)
    known = {**vars(part), **part.defaults}
    takes = list(inspect.signature(kind).parameters)[1:]
    own = {**copied(_without(group)), "params": [parameter]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said when the real one was made
            return kind([own], **{name: copied(known[name]) for name in takes if name in known})
    except Exception:  # one that needs more than it tells
        trial = shell(part)
        trial.state = defaultdict(dict)
        trial.param_groups = [own]
        return trial


def at_start(part: Any, group: Group) -> Group:
    """A group's options without what steps change in it: counts, and what else is kept for all of its parameters."""
    varying = counts(part, group)
    return {name: value for name, value in group.items() if name not in varying}


def shell(optimizer: Any) -> Any:
    """An optimizer of the same kind and settings without parameters, state and hooks of its own."""
    own: Any = object.__new__(type(optimizer))
    # A scheduler puts a counting `step` on the object.
    own.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    for hooks in [name for name in own.__dict__ if name.startswith("_optimizer_step_")]:
        setattr(own, hooks, OrderedDict())
    return own


def counts(part: Any, group: Group) -> set[str]:
    """The names of a group's entries that steps change."""
    own = _ones(group)
    trial = anew(part, group, own)
    before = copied(_without(trial.param_groups[0]))
    _steps(trial, own, [own.detach() * i for i in (1, 2, 3)])
    after = _without(trial.param_groups[0])
    return {name for name, value in after.items() if name != "lr" and (name not in before or _differ(before[name], value))}


def keeps_own_counts(part: Any, group: Group) -> bool:
    """Whether an optimizer counts beside its groups and the states of its parameters, where a reset of some can't reach."""
    own = _ones(group)
    trial = anew(part, at_start(part, group), own)
    before = {name: copied(value) for name, value in vars(trial).items() if _is_number(value)}
    _steps(trial, own, [own.detach() * i for i in (1, 2, 3)])
    moved = any(_differ(value, vars(trial)[name]) for name, value in before.items())
    return moved or any(not isinstance(key, Tensor) for key in trial.state)


def _ones(group: Group) -> nn.Parameter:
    like = group["params"][0]
    return nn.Parameter(torch.ones([4, 3, 2, 2][: max(like.dim(), 1)], device=like.device, dtype=like.dtype))


def _without(group: Group, names: Any = ()) -> Group:
    return {name: value for name, value in group.items() if name != "params" and name not in names}


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return type(one) is not type(other) or repr(one) != repr(other)


@torch.no_grad()
def _steps(trial: Any, parameter: nn.Parameter, gradients: Sequence[Tensor]) -> None:
    # What torchao compiles for each shape is run as it is written.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gradient in gradients:
            parameter.grad = gradient.clone()
            type(trial).step(trial)


@dataclass
class Trial:
    """What some steps of a new optimizer came to.

    Attributes:
        update: the last step, of the parameter's shape.
        state: what is kept for the parameter.
    """

    update: Tensor
    state: dict[str, Any]


def tried(part: Any, group: Group, weight: Tensor, gradients: Sequence[Tensor], after_first: Any = None) -> Trial:
    """Steps of a new optimizer like `part` on a weight, without weight decay and at one learning rate.

    Args:
        group: as `at_start` gives it.
        after_first: called with the parameter's state after the first step.
    """
    seed_everything(0)
    parameter = nn.Parameter(weight.clone())
    trial = anew(part, group, parameter)
    own = trial.param_groups[0]
    own["weight_decay"] = type(own.get("weight_decay", 0.0))(0)
    if own.get("lr") is not None:
        own["lr"] = torch.full_like(own["lr"], _RATE) if isinstance(own["lr"], Tensor) else _RATE
    _steps(trial, parameter, gradients[:1])
    if after_first is not None:
        after_first(trial.state[parameter])
    _steps(trial, parameter, gradients[1:-1])
    before = parameter.detach().clone()
    _steps(trial, parameter, gradients[-1:])
    return Trial(parameter.detach() - before, trial.state.get(parameter, {}))


# A schedule with a warm-up begins at 0, where nothing could be seen.
_RATE = 1e-2
