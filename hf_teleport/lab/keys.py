"""Names and values that a user writes: duplicates, the nearest known name, and the right kind of value."""

import difflib
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_CALLED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class _Loader(yaml.SafeLoader):
    """YAML wants the keys of a mapping to be unique; the library would take the last of several without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                raise ValueError(
                    f"{self.name}, line {line}: key {key.value!r} is given twice in one mapping, first in line "
                    f"{first[key.tag, key.value]}; take one of the two out."
                )
            first[key.tag, key.value] = line
        return node


def from_yaml(text: str, source: str) -> Any:
    """What a YAML text holds.

    Args:
        source: what it is called in errors: a file's path, or the name of an argument.

    Raises:
        ValueError: it is not YAML, or has a key twice in one mapping; the message names the source and the line.
    """
    try:
        loader = _Loader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        tab = "; YAML wants blanks instead of tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"{source} is not YAML, correct it where this says: {error}{tab}") from error


def require_known(key: str, known: Iterable[str], where: str) -> None:
    """Checks that a key is one of those there are.

    Raises:
        ValueError: it is not; the message names it and the nearest one.
    """
    names = list(known)
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"unknown key {key!r} in {where}{hint}.")


def require_fit(key: str, value: Any, kind: type) -> None:
    """Checks that a value read from YAML is of the kind that a dataclass wants. Texts are read later, as on a command line.

    Args:
        key: a field of the dataclass `kind`.

    Raises:
        ValueError: it is not; the message names the kinds that are allowed.
    """
    wanted = _kinds(get_type_hints(kind)[key])
    if value is None or isinstance(value, str):
        return
    if isinstance(value, list | dict):
        fits = type(value) in wanted
    elif isinstance(value, bool):
        fits = bool in wanted or str in wanted
    else:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        fits = float in wanted or str in wanted or (int in wanted and whole) or not wanted & {int, list, dict}
    if not fits:
        allowed = " or ".join(name for known, name in _CALLED.items() if known in wanted)
        raise ValueError(f"{key} = {value!r} is not allowed; allowed: {allowed}.")


def _kinds(hint: Any) -> set[type]:
    """The alternatives of a type that YAML can tell apart; a choice among texts is a text."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return set().union(*(_kinds(part) for part in get_args(hint)))
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return {str}
    plain = origin or hint
    if plain is NoneType or not isinstance(plain, type):
        return set()
    return {next((known for known in _CALLED if issubclass(plain, known)), str)}
