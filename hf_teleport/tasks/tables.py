"""Rows to train and evaluate on: from files, folders or the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict, Value, load_dataset

from hf_teleport.lab.data.catalogue import Source
from hf_teleport.lab.data.rows import load_splits, require_column
from hf_teleport.tasks.arguments import DataArguments

_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}

# Under which name the Hub's data sets keep rows to evaluate on, best first.
_HELD_OUT = ("validation", "valid", "validation_matched", "dev", "test")

_WAYS = "give train_file = a .csv, .json, .jsonl, .parquet or .txt file, or dataset_name = a local folder or a Hub id"


def image_folders(folders: dict[str, str]) -> Any:
    """A `datasets.DatasetDict` of the image files in each folder, whose subfolders are the classes."""
    # Together, so that a class has the same number in all.
    return load_dataset("imagefolder", data_files={name: str(Path(folder, "**")) for name, folder in folders.items()})


def load_tables(data: DataArguments, seed: int = 0, read_folders: Callable[[dict[str, str]], Any] = image_folders) -> Any:
    """A `datasets.DatasetDict` of 'train' and 'validation'.

    Args:
        seed: of the split, where there are no rows to evaluate on.
        read_folders: makes rows of `train_dir` and `validation_dir`, if they are given.

    Raises:
        FileNotFoundError: a file or folder that is not there, or a Hub id that is neither cached nor within reach.
        ValueError: no data named, a file of an unknown kind, or no training rows.
    """
    splits = _splits(data, read_folders)
    if "train" not in splits:
        raise ValueError(f"the data has the splits {list(splits)}; 'train' is needed. Or {_WAYS}.")
    held_out = next((name for name in _HELD_OUT if name in splits), None)
    if held_out is None:
        parts = splits["train"].train_test_split(test_size=data.validation_split_percentage / 100, seed=seed)
        tables = {"train": parts["train"], "validation": parts["test"]}
    else:
        tables = {"train": splits["train"], "validation": splits[held_out]}
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    return DatasetDict({name: _first(rows, limits[name]) for name, rows in tables.items()})


def text_column(rows: Any, name: str | None) -> str:
    """The column that has the text: the one named, or 'text', or the first with text in it.

    Raises:
        ValueError: no such column.
    """
    if name is None:
        texts = [column for column, kind in rows.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
        if not texts:
            raise ValueError(f"the data has no column of text: its columns are {rows.column_names}. Or {_WAYS}.")
        return "text" if "text" in texts else texts[0]
    require_column(rows, name)
    return name


def typed_column(rows: Any, name: str | None, kind: Any) -> str:
    """The column of images or sounds: the one named, or the first of this type of `datasets`, or the one called as the type is.

    Raises:
        ValueError: no such column.
    """
    typed = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    found = name or (typed[0] if typed else kind.__name__.lower())
    require_column(rows, found)
    return found


def existing_path(argument: str, path: str) -> str:
    """The path of a file or folder.

    Raises:
        FileNotFoundError: it is not there.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{argument} = {path!r} does not exist (looked for in {Path.cwd()}): {_WAYS}.")
    return str(found)


def _splits(data: DataArguments, read_folders: Callable[[dict[str, str]], Any]) -> Any:
    if data.dataset_name:
        return load_splits(Source(data.dataset_name, config=data.dataset_config_name))
    folders = {"train": getattr(data, "train_dir", None), "validation": getattr(data, "validation_dir", None)}
    if folders["train"]:
        return read_folders({name: existing_path(f"{name}_dir", folder) for name, folder in folders.items() if folder})
    files = {name: path for name, path in (("train", data.train_file), ("validation", data.validation_file)) if path}
    if "train" not in files:
        raise ValueError(f"there is no data to train on: {_WAYS}.")
    paths = {name: Path(existing_path(f"{name}_file", path)) for name, path in files.items()}
    for name, path in paths.items():
        if path.suffix not in _KINDS:
            raise ValueError(f"{name}_file = {str(path)!r} is not allowed; allowed: a file that ends in {', '.join(_KINDS)}.")
    if len(kinds := {_KINDS[path.suffix] for path in paths.values()}) > 1:
        raise ValueError(f"train_file and validation_file are of the kinds {sorted(kinds)}; allowed: both of one kind.")
    return load_dataset(kinds.pop(), data_files={name: str(path) for name, path in paths.items()})


def _first(rows: Any, count: int | None) -> Any:
    return rows if count is None else rows.select(range(min(count, len(rows))))
