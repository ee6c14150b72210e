"""The rows of a file. For a file that cannot be read, an error names the argument, the file, the line and the way out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""For each suffix the format of `datasets.load_dataset`."""

# A zero byte among this many first bytes means that a text is in one of these encodings, or is no text.
_HEAD = 4096
_WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")

# The longest value or error in a message.
_LONGEST = 300


def read_rows(argument: str, path: str | Path) -> Any:
    """The rows of a file as a `datasets.Dataset`.

    Args:
        argument: the name of the argument that the user gave the file by, for errors.
        path: a file that ends in one of `KINDS`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is a folder, of an unknown kind, empty or broken, or text that is not UTF-8.
    """
    from datasets import load_dataset

    file, given = Path(path).expanduser(), f"{argument} = {str(path)!r}"
    if not file.exists():
        raise FileNotFoundError(f"{given} does not exist (looked for in {Path.cwd()}); give the path of a file.")
    if not file.is_file() or file.suffix not in KINDS:
        found = "" if file.is_file() else "a folder is "
        raise ValueError(f"{given}: {found}not allowed; allowed: a file that ends in {', '.join(KINDS)}.")
    kind = KINDS[file.suffix]
    if not file.stat().st_size:
        raise ValueError(f"{given} is empty; give a file with rows.")
    if kind != "parquet" and (problem := _encoding(file, head=True)):
        raise ValueError(f"{given} {problem}")
    try:
        with _silent():
            rows = load_dataset(kind, data_files=str(file), split="train")
    except Exception as error:  # the type depends on the library that reads the file
        raise ValueError(f"{given} {_problem(file, kind, error)}") from error
    if not len(rows):
        raise ValueError(f"{given} has no rows; give a file with some.")
    return rows


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, `datasets` prints nothing: what is wrong with a file is said once."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def shortened(value: object) -> str:
    """An error or a value in one line of limited length."""
    text = " ".join((str(value) if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _problem(file: Path, kind: str, error: BaseException) -> str:
    """Why a file could not be read, and the way out."""
    if kind == "parquet":
        with file.open("rb") as opened:
            magic = opened.read(4)
        what = "is cut short or broken" if magic == b"PAR1" else "is no Parquet file"
        return f"{what}; write it again, for instance by Dataset.to_parquet."
    if problem := _encoding(file):
        return problem
    if kind == "json" and (problem := _json(file)):
        return problem
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause) or type(cause).__name__ in ("SchemaInferenceError", "EmptyDataError"):
        return "has no rows; give a file with some."
    return f"could not be read as {kind}, correct it where this says: {shortened(cause)}"


def _encoding(file: Path, head: bool = False) -> str:
    """What is wrong with the encoding of a text; empty: nothing. With `head`, only its first bytes are checked."""
    with file.open("rb") as opened:
        start = opened.read(_HEAD)
        if wide := _wide(start):
            return f"is not UTF-8: it looks like {wide}. Save it as UTF-8, for instance: iconv -f {wide} -t UTF-8 OLD > NEW"
        if b"\0" in start:
            kinds = ", ".join(KINDS)
            return f"is no text: byte {start.index(0) + 1} is zero. Give a file of text, or name it by what it is: {kinds}."
        if head:
            return ""
        opened.seek(0)
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"is not UTF-8: line {number} has the byte 0x{line[error.start]:02x}. Save it as UTF-8, for instance, if it "
                    "is Latin-1: iconv -f LATIN1 -t UTF-8 OLD > NEW"
                )
    return ""


def _wide(start: bytes) -> str:
    """The encoding of more than a byte a character by which some bytes are text; empty: none."""
    for name in ("UTF-32", "UTF-16") if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:4] == b"\0\0\xfe\xff" else _WIDE:
        try:
            text = start[: len(start) // 4 * 4].decode(name)
        except UnicodeDecodeError:
            continue
        common = [character for character in text if character.isascii() and (character.isprintable() or character in "\r\n\t")]
        if text and len(common) > len(text) / 2:
            return name
    return ""


def _json(file: Path) -> str:
    """What is wrong with a file of JSON: one list of objects, or an object a line; empty: nothing that is seen here."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        wrong = next(((number, row) for number, row in enumerate(whole, 1) if not isinstance(row, dict)), None)
        return f"has {shortened(wrong[1])} as row {wrong[0]}; allowed: an object." if wrong else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line or "{}", object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            return f"is broken in line {number}, correct it there: {error}."
        if not isinstance(row, dict):
            return f"has {shortened(row)} in line {number}; allowed: an object a line, or one list of objects."
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"the key {twice[0]!r} stands there twice, take one out")
    return dict(pairs)
