"""What steps depend on beside an optimizer's state: tensors kept elsewhere, hooks, a `step` that was replaced.

Neither a turn nor a reset reaches it. What a new optimizer of the same kind shows by itself, `rules` finds out; here the real one
is looked at, for what was put on it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_teleport.optimizers.parts import gradient_hooks, inside, own_attributes, parts, unwrapped
from hf_teleport.optimizers.reach import TooMuchError, has_coordinates, reach
from hf_teleport.optimizers.trial import anew, at_start, ones
from hf_teleport.weights.copies import tensors_in
from hf_teleport.weights.isolation import preserved_rng

# Libraries whose hooks, and wrappers of `step`, keep nothing of gradients.
_TRUSTED = ("torch", "torchao", "accelerate")


def hidden(optimizer: Any) -> str:
    """What an optimizer's steps depend on, or may, beside its state; empty: nothing that is seen."""
    outer, stepping = unwrapped(optimizer), parts(optimizer)
    own = {p for each in (outer, *stepping) for group in each.param_groups for p in group["params"]}
    known = {id(tensor) for p in own for tensor in (p, p.grad)}
    known |= {id(tensor) for each in stepping for key, state in each.state.items() if key in own for tensor in tensors_in(state)}
    for part in {id(each): each for each in (outer, *stepping)}.values():
        name = type(part).__name__
        for hook in [hook for when in ("pre", "post") for hook in vars(part).get(f"_optimizer_step_{when}_hooks", {}).values()]:
            if not _is_trusted(hook):
                return f"{name} has a step hook ({_name(hook)}), and what it does can't be found out"
        if "step" in vars(part) and not _is_trusted(vars(part)["step"], type(part).step):
            return f"the step of {name} was replaced by another function ({_name(vars(part)['step'])})"
        try:
            if part in stepping and (place := _by_identity(part, own)):
                return f"{name} tells weights apart by what it keeps in {place}, which a trial on other weights can't show"
            if found := next(_strays(part, part in stepping, own, known), None):
                return f"{name} keeps a {found[1]} in {found[0]}, beside its state"
        except TooMuchError as error:
            return f"{name} can't be looked through: {error}"
    return ""


def _strays(part: Any, judged: bool, own: set[Any], known: set[int]) -> Iterator[tuple[str, str]]:
    """Where arrays are kept that are neither known nor of the model that the parameters are of."""
    roots = [("its state", value) for key, value in part.state.items() if not (judged and isinstance(key, nn.Parameter))]
    roots += [(f"group.{k}", value) for group in part.param_groups for k, value in group.items() if k != "params"]
    plain = [p for group in part.param_groups for p in group["params"] if type(p) in (Tensor, nn.Parameter)]
    roots += [(f"parameter.{name}", value) for p in plain for name, value in vars(p).items()]
    roots += [("a hook of a parameter", hook) for hook in gradient_hooks(part) if not _is_trusted(hook)]
    roots += list(_put_on(part).items())
    for path, value in reach(roots):
        if isinstance(value, nn.Module) and any(p in own for p in value.parameters()):
            known |= {id(tensor) for tensor in (*value.parameters(), *value.buffers())}
        elif has_coordinates(value) and id(value) not in known:
            yield path, f"{type(value).__name__} {list(value.shape)}"


def _by_identity(part: Any, own: set[Any]) -> str:
    """Where an optimizer notes something about some weights by which they are; empty: nowhere that is seen."""
    stepped = {p for group in part.param_groups for p in group["params"]}
    numbers = {id(p): p for p in own}
    attributes = own_attributes(part).items()
    # What bitsandbytes decides for single weights is how many bits their averages have, which these show.
    roots = [(name, value) for name, value in attributes if not type(value).__module__.startswith("bitsandbytes")]
    for path, value in reach(roots):
        if isinstance(value, (Mapping, set, frozenset, list, tuple)):
            found = {id(each): each for each in (numbers.get(each) if isinstance(each, int) else each for each in value)}
            named = {p for p in found.values() if isinstance(p, Tensor) and p in own}
            if named and (isinstance(value, Mapping) or named < stepped):
                return path
    return ""


# For each class the attributes that a new optimizer has.
_NEW: WeakKeyDictionary[type, set[str]] = WeakKeyDictionary()


def _put_on(part: Any) -> dict[str, Any]:
    """The attributes that a new optimizer of this kind does not have; all of one that holds others."""
    own = own_attributes(part)
    groups = [group for group in part.param_groups if group["params"]]
    if inside(part) or not groups:
        return own
    if type(part) not in _NEW:
        with preserved_rng():
            _NEW[type(part)] = set(vars(anew(part, at_start(part, groups[0]), ones(groups[0]))))
    return {name: value for name, value in own.items() if name not in _NEW[type(part)]}


def _is_trusted(function: Callable[..., Any], written: Any = None) -> bool:
    """Whether a trusted library made a function, and, for a `step`, whether it calls the one that is written in the class."""
    while isinstance(function, partial):
        function = function.func
    inner = inspect.unwrap(function)
    made_by = getattr(getattr(function, "__func__", function), "__globals__", {}).get("__name__", "")
    return made_by.split(".")[0] in _TRUSTED and (
        written is None or inner in (written, inspect.unwrap(written)) or inner is function
    )


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
