"""Load rows to train and evaluate on, from files, folders or the Hub."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

from hf_teleport.inputs.rows import read_rows, shortened
from hf_teleport.lab.data.catalogue import Source
from hf_teleport.lab.data.rows import load_splits
from hf_teleport.tasks.arguments import DataArguments

# Names of the Hub's splits to evaluate on, in the order of preference.
_HELD_OUT = ("validation", "valid", "validation_matched", "dev", "test")

_WAYS = "give train_file = a .csv, .json, .jsonl, .parquet or .txt file, or dataset_name = a local folder or a Hub id"


Check = Callable[[Any, str], Any]
"""Raises ValueError if rows can't be used. The second argument names their source in errors."""


def image_folders(folders: dict[str, str]) -> Any:
    """A `datasets.DatasetDict` of the image files in each folder, whose subfolders are the classes.

    Raises:
        ValueError: a folder has no files in subfolders.
    """
    if empty := [folder for folder in folders.values() if not any(path.is_file() for path in Path(folder).glob("*/**/*"))]:
        raise ValueError(f"{empty[0]!r} has no files in subfolders; give a folder with a subfolder for each class.")
    # Load both folders together, so that a class has the same number in both.
    return load_dataset("imagefolder", data_files={name: str(Path(folder, "**")) for name, folder in folders.items()})


def load_tables(
    data: DataArguments, check: Check, seed: int = 0, read_folders: Callable[[dict[str, str]], Any] = image_folders
) -> Any:
    """A `datasets.DatasetDict` of 'train' and 'validation'.

    Args:
        data: the task's arguments for the data.
        check: is called with the rows of each split, before rows are split or left out.
        seed: the seed of the random split, if there are no rows to evaluate on.
        read_folders: reads the rows of `train_dir` and `validation_dir`, if they are given.

    Raises:
        FileNotFoundError: a file or folder does not exist, or a Hub id is not cached and can't be downloaded.
        ValueError: no data are named, they can't be read, there are no training rows or too few to split, or `check` fails.
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
        FileNotFoundError: it does not exist.
        ValueError: it is a file.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{argument} = {path!r} does not exist (looked for in {Path.cwd()}): give an existing folder.")
    if not found.is_dir():
        raise ValueError(f"{argument} = {path!r} is a file; allowed: a folder with a subfolder of files for each class.")
    return str(found)


def _splits(data: DataArguments, read_folders: Callable[[dict[str, str]], Any]) -> tuple[Any, Callable[[Any], str]]:
    """The splits, and a function that describes the source of a split."""
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
    except Exception as error:  # the type depends on the library that reads the files
        raise ValueError(
            f"{argument} = {name!r} could not be loaded: {shortened(error.__cause__ or error)}. Or {_WAYS}."
        ) from error


def _like(rows: Any, train: Any, source: str) -> Any:
    """Select and cast columns, so that rows have the columns and types of the training rows."""
    if missing := [column for column in train.column_names if column not in rows.column_names]:
        raise ValueError(f"{source} has the columns {rows.column_names}; add {missing}, which the training rows have.")
    rows = rows.select_columns(train.column_names)
    try:
        return rows if rows.features == train.features else rows.cast(train.features)
    except Exception as error:  # pyarrow raises several types
        raise ValueError(
            f"{source} has columns of other types than the training rows; give both the same types: {shortened(error)}"
        ) from error


def _set_apart(rows: Any, percentage: float, seed: int, source: str) -> dict[str, Any]:
    """Split rows at random: some to evaluate on, and the others to train on."""
    apart = math.ceil(percentage / 100 * len(rows))
    if not 0 < apart < len(rows):
        raise ValueError(
            f"{source}: validation_split_percentage = {percentage} does not split its {len(rows)} rows into two parts; give a "
            "validation_file, or a percentage that leaves rows for training and evaluation."
        )
    parts = rows.train_test_split(test_size=apart, seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def require_some(argument: str, number: int | None) -> None:
    """Make sure that a number of rows is 1 or more. None: all rows.

    Raises:
        ValueError: it is not.
    """
    if number is not None and number < 1:
        raise ValueError(f"{argument} = {number} is not allowed; allowed: 1 or more.")


def _first(rows: Any, argument: str, number: int | None) -> Any:
    require_some(argument, number)
    return rows if number is None else rows.select(range(min(number, len(rows))))
