"""Checks of keys and values in a user's YAML: duplicate keys, unknown keys with the nearest known one, wrong types."""

import difflib
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_CALLED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys in a mapping. YAML forbids them, but the library silently takes the last one."""

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
                    f"{first[key.tag, key.value]}; remove one of the two."
                )
            first[key.tag, key.value] = line
        return node


def from_yaml(text: str, source: str) -> Any:
    """Parse a YAML text.

    Args:
        source: its name in errors: a file's path, or the name of an argument.

    Raises:
        ValueError: it is not YAML, or has a key twice in one mapping. The message names the source and the line.
    """
    try:
        loader = _Loader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        tab = "; YAML needs blanks instead of tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"{source} is not YAML, correct it where this says: {error}{tab}") from error


def require_known(key: str, known: Iterable[str], where: str) -> None:
    """Check that a key is known.

    Raises:
        ValueError: it is not. The message names it and the nearest known key.
    """
    names = list(known)
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"unknown key {key!r} in {where}{hint}.")


def require_fit(key: str, value: Any, kind: type) -> None:
    """Check that a value from YAML has the type of a dataclass's field. Strings are parsed later, as on a command line.

    Args:
        key: a field of the dataclass `kind`.

    Raises:
        ValueError: the type is wrong. The message names the types that are allowed.
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
    """The alternatives of a type, as far as YAML distinguishes them. A choice among strings counts as a string."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return set().union(*(_kinds(part) for part in get_args(hint)))
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return {str}
    plain = origin or hint
    if plain is NoneType or not isinstance(plain, type):
        return set()
    return {next((known for known in _CALLED if issubclass(plain, known)), str)}
