"""Values of settings: read from Python, YAML or the command line, and checked.

A reader takes a setting's name and the value that was given, and returns the value to keep. All of them raise `ValueError` with
the name, the value, and what is allowed.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, field
from typing import Any, Literal, get_args, get_origin

Reader = Callable[[str, Any], Any]


def setting(default: Any, help: str, reader: Reader | None = None) -> Any:
    """A dataclass field with its help text and its reader; without a reader the value is kept as it is."""
    metadata = {"help": help, "reader": reader}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def read(setting: "Field[Any]", value: Any) -> Any:
    """A setting's value, as its reader and the choices of its type need it.

    Raises:
        ValueError: it is not allowed.
    """
    reader, choices = setting.metadata["reader"], _choices(setting.type)
    value = reader(setting.name, value) if reader else value
    require(not choices or value in choices, setting.name, value, "one of " + ", ".join(map(repr, choices)))
    return value


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Check a condition on a setting.

    Raises:
        ValueError: it does not hold.
    """
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}.")


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of one that may be None; empty: the type has no choices."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inside = [choice for part in get_args(annotation) if get_origin(part) is Literal for choice in get_args(part)]
    return (*inside, None) if inside else ()


def within(reader: Reader, holds: Callable[[Any], bool], allowed: str) -> Reader:
    """A reader that also checks the range of what it reads."""

    def checked(name: str, given: Any) -> Any:
        value = reader(name, given)
        require(holds(value), name, value, allowed)
        return value

    return checked


def or_none(reader: Reader) -> Reader:
    """A reader that lets None pass."""
    return lambda name, value: None if value is None else reader(name, value)


def number(name: str, value: Any) -> float:
    """A finite number. YAML reads 1e-3 (no dot) as text, so texts are converted."""
    try:
        converted = float(value)
    except (TypeError, ValueError):
        converted = math.nan
    require(math.isfinite(converted), name, value, "a finite number")
    return converted


def limit(name: str, value: Any) -> float | None:
    """A number, or None for no limit, which on the command line is 'inf'."""
    if value is None or str(value).lower() in ("inf", "none"):
        return None
    return number(name, value)


def integer(name: str, value: Any) -> int:
    """A whole number."""
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: a whole number.") from None


def words(name: str, value: Any) -> list[str]:
    """A list of words; on the command line and in YAML also one text with commas."""
    require(isinstance(value, Iterable), name, value, "a list of words")
    return [word.strip() for part in ([value] if isinstance(value, str) else value) for word in str(part).split(",")]


def none_if_empty(name: str, value: Any) -> Any:
    """None for an empty text: the command line has no other way to say None."""
    return None if value == "" else value


def modules(name: str, value: Any) -> list[str] | str | None:
    """A list of names, or a regular expression that compiles."""
    if value is None or isinstance(value, str):
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{name} = {value!r} is not allowed: as a regular expression it fails, {error}.") from None
        return value
    require(isinstance(value, Iterable) and all(isinstance(v, str) for v in value), name, value, "a list of names, or a text")
    return list(value)


DOUBLING = "doubling"
"""Steps 10, 20, 40, ..."""


def parse_steps(steps: list[int] | int | str | None) -> list[int] | str | None:
    """'10,100', '10', 10 and [10, 100] are lists of steps; None and an empty text are none; 'doubling' stays."""
    if steps is None or (isinstance(steps, str) and steps.strip().lower() in ("", "none")):
        return None
    if isinstance(steps, str) and steps.strip().lower() == DOUBLING:
        return DOUBLING
    if isinstance(steps, str):
        numbers: Iterable[Any] = [part for part in steps.strip("[] ").split(",") if part.strip()]
    else:
        numbers = steps if isinstance(steps, Iterable) else [steps]
    allowed = "optimizer steps from 0, for instance '10,100', or 'doubling'"
    try:
        parsed = sorted({integer("steps", number) for number in numbers})
    except ValueError:
        raise ValueError(f"steps = {steps!r} is not allowed; allowed: {allowed}.") from None
    require(all(number >= 0 for number in parsed), "steps", steps, allowed)
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
    require(smallest >= 0, "epochs", epochs, "a count of first epochs, or a list of epoch indices from 0")
    return parsed
