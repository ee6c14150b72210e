"""Rows to train and evaluate on: from files, folders or the Hub."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

from hf_teleport.inputs.rows import read_rows, shortened
from hf_teleport.lab.data.catalogue import Source
from hf_teleport.lab.data.rows import load_splits
from hf_teleport.tasks.arguments import DataArguments

# The names under which the Hub's data sets keep rows to evaluate on, best first.
_HELD_OUT = ("validation", "valid", "validation_matched", "dev", "test")

_WAYS = "give train_file = a .csv, .json, .jsonl, .parquet or .txt file, or dataset_name = a local folder or a Hub id"


Check = Callable[[Any, str], Any]
"""Raises ValueError if rows cannot be used. The second argument names their source in errors."""


def image_folders(folders: dict[str, str]) -> Any:
    """A `datasets.DatasetDict` of the image files in each folder, whose subfolders are the classes.

    Raises:
        ValueError: a folder without files in subfolders.
    """
    if empty := [folder for folder in folders.values() if not any(path.is_file() for path in Path(folder).glob("*/**/*"))]:
        raise ValueError(f"{empty[0]!r} has no files in subfolders; give a folder that has one for each class.")
    # Both folders together, so that a class has the same number in both.
    return load_dataset("imagefolder", data_files={name: str(Path(folder, "**")) for name, folder in folders.items()})


def load_tables(
    data: DataArguments, check: Check, seed: int = 0, read_folders: Callable[[dict[str, str]], Any] = image_folders
) -> Any:
    """A `datasets.DatasetDict` of 'train' and 'validation'.

    Args:
        check: is called with the rows of each of them, before rows are set apart or left out.
        seed: of the split, where there are no rows to evaluate on.
        read_folders: makes rows of `train_dir` and `validation_dir`, if they are given.

    Raises:
        FileNotFoundError: a file or folder that is not there, or a Hub id that is neither cached nor within reach.
        ValueError: no data named, data that cannot be read, no training rows, too few to set some apart, or what `check` says.
    """
    splits, source = _splits(data, read_folders)
    if "train" not in splits:
        raise ValueError(f"the data has the splits {list(splits)}; 'train' is needed. Or {_WAYS}.")
    tables = {"train": splits["train"]}
    held_out = next((name for name in _HELD_OUT if name in splits), None)
    if held_out is not None:
        tables["validation"] = _like(splits[held_out], splits["train"], source(held_out))
    for name, rows in tables.items():
        check(rows, source(name if name == "train" else held_out))
    if held_out is None:
        tables = _set_apart(tables["train"], data.validation_split_percentage, seed, source("train"))
    limits = {"train": ("max_train_samples", data.max_train_samples), "validation": ("max_eval_samples", data.max_eval_samples)}
    return DatasetDict({name: _first(rows, *limits[name]) for name, rows in tables.items()})


def existing_folder(argument: str, path: str) -> str:
    """The path of a folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is a file.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(
            f"{argument} = {path!r} does not exist (looked for in {Path.cwd()}): give a folder that is there."
        )
    if not found.is_dir():
        raise ValueError(f"{argument} = {path!r} is a file; allowed: a folder with a subfolder of files for each class.")
    return str(found)


def _splits(data: DataArguments, read_folders: Callable[[dict[str, str]], Any]) -> tuple[Any, Callable[[Any], str]]:
    """The splits, and a function that names the source of one of them."""
    if data.dataset_name and Path(data.dataset_name).is_file():
        return {"train": read_rows("dataset_name", data.dataset_name)}, lambda name: f"dataset_name = {data.dataset_name!r}"
    if data.dataset_name:
        named = Source(data.dataset_name, config=data.dataset_config_name)
        splits = _read(lambda: load_splits(named), "dataset_name", named.path)
        return splits, lambda name: f"dataset_name = {named.path!r}, split {name!r}"
    folders = {"train": getattr(data, "train_dir", None), "validation": getattr(data, "validation_dir", None)}
    if folders["train"]:
        found = {name: existing_folder(f"{name}_dir", folder) for name, folder in folders.items() if folder}
        return _read(lambda: read_folders(found), "train_dir", folders["train"]), lambda name: f"{name}_dir = {folders[name]!r}"
    files = {name: path for name, path in (("train", data.train_file), ("validation", data.validation_file)) if path}
    if "train" not in files:
        raise ValueError(f"there is no data to train on: {_WAYS}.")
    splits = {name: read_rows(f"{name}_file", path) for name, path in files.items()}
    return splits, lambda name: f"{name}_file = {files[name]!r}"


def _read(load: Callable[[], Any], argument: str, name: str) -> Any:
    try:
        return load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{argument} = {name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{argument} = {name!r}: {error}") from error
    except Exception as error:  # of whatever library reads the files
        raise ValueError(
            f"{argument} = {name!r} could not be loaded: {shortened(error.__cause__ or error)}. Or {_WAYS}."
        ) from error


def _like(rows: Any, train: Any, source: str) -> Any:
    """Rows with the columns of the training rows, and of their types."""
    if missing := [column for column in train.column_names if column not in rows.column_names]:
        raise ValueError(f"{source} has the columns {rows.column_names}; needed are those of the training rows, also {missing}.")
    rows = rows.select_columns(train.column_names)
    try:
        return rows if rows.features == train.features else rows.cast(train.features)
    except Exception as error:  # of whatever kind pyarrow raises
        raise ValueError(
            f"{source} has columns of other types than the training rows, make them alike: {shortened(error)}"
        ) from error


def _set_apart(rows: Any, percentage: float, seed: int, source: str) -> dict[str, Any]:
    """Some of the rows to evaluate on, drawn at random, and the others to train on."""
    apart = math.ceil(percentage / 100 * len(rows))
    if not 0 < apart < len(rows):
        raise ValueError(
            f"{source}: of its {len(rows)} rows, validation_split_percentage = {percentage} cannot be set apart to evaluate on; "
            "give a validation_file, or a percentage that leaves rows for both."
        )
    parts = rows.train_test_split(test_size=apart, seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def _first(rows: Any, argument: str, number: int | None) -> Any:
    if number is not None and number < 1:
        raise ValueError(f"{argument} = {number} is not allowed; allowed: 1 or more.")
    return rows if number is None else rows.select(range(min(number, len(rows))))
