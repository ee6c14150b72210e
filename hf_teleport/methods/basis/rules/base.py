"""The registry of rules: what an operation does to features.

A rule gets the `Call`, notes facts, and returns the features of the output: a tuple with one tensor, or one such tuple for each
output. It returns None where the output has none.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_teleport.methods.basis.follow import Call

Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
"""By the operation's plain name, as `operation_name` gives it."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for the operations of these names."""

    def decorate(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return decorate


def why(call: Call, constants: Sequence[Tensor], otherwise: str) -> str:
    """The reason for which one of these tensors has no features, if it came out of the model."""
    return next((call.follow.reasons[t] for t in constants if t in call.follow.reasons), otherwise)
