"""Names that a user writes: an unknown one is an error that knows the nearest."""

import difflib
from collections.abc import Iterable


def require_known(key: str, known: Iterable[str], where: str) -> None:
    """Checks that a key is one of those there are.

    Raises:
        ValueError: it is not; the message names it and the nearest one.
    """
    names = list(known)
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"unknown key {key!r} in {where}{hint}.")
