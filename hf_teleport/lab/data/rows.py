"""Shared parts of the data modules: rows as tensors in memory, and the splits of a data set from a folder or the Hub."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_teleport.lab.data.catalogue import CATALOGUE, Source, find

# Names of held-out splits, in the order of preference.
_TEST_SPLITS = ("test", "validation", "valid")


class TensorRows(Dataset):
    """Named columns (N, ...) of the same length. Row i has the i-th entry of each column.

    Raises:
        ValueError: there are no columns, or their lengths differ.
    """

    def __init__(self, **columns: Tensor):
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns = {lengths} is not allowed; allowed: one or more columns, all of one length.")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def load_splits(source: str | Source, folder: str | Path | None = None) -> Any:
    """Load a `datasets.DatasetDict` by a name of the catalogue, a Hub id, or a local folder or file (parquet, csv, json, images).

    Args:
        source: what to load. A name of the catalogue wins over a folder with that name; for the folder give './name'.
        folder: a local copy, which is read instead.

    Raises:
        FileNotFoundError: there is no such folder or file, or the Hub's copy is not cached and can't be downloaded.
    """
    from datasets import load_dataset

    entry = find(source)
    path = Path(entry.path if folder is None else folder).expanduser()
    home = f" The data are published at {entry.home}." if entry.home else ""
    is_local = folder is not None or path.exists() or entry.path.startswith((".", "/", "~")) or entry.path.count("/") > 1
    if is_local and not path.exists():
        raise FileNotFoundError(
            f"there is no folder or file {str(path)!r}: give a local folder of parquet files (train and test, or one "
            f"data.parquet), or a Hub id such as 'ylecun/mnist'. Or give a name of the catalogue, {', '.join(CATALOGUE)}.{home}"
        )
    try:
        if path.is_file():
            return load_dataset(str(path.parent), data_files=path.name)
        if is_local:
            return load_dataset(str(path))
        return load_dataset(entry.path, entry.config, revision=entry.revision)
    except (OSError, RuntimeError, ValueError) as error:
        details = [f"{name} {value!r}" for name, value in (("config", entry.config), ("revision", entry.revision)) if value]
        tried = f"the local {str(path)!r}" if is_local else " ".join([f"the Hub's data set {entry.path!r}", *details])
        raise FileNotFoundError(
            f"{tried} could not be loaded: {error}. Data that were loaded once are cached. Without a network, give a local "
            f"folder of parquet files (train and test, or one data.parquet) as `folder` or in place of the name.{home}"
        ) from error


def split_roles(source: str | Source, folder: str | Path | None = None) -> dict[str, Any]:
    """The splits by role: 'train', 'test', and 'validation' if it is not the test split.

    Raises:
        FileNotFoundError: as `load_splits`.
        ValueError: there is no train split, or neither a test nor a validation split.
    """
    entry = find(source)
    splits = load_splits(entry, folder)
    wanted = (entry.test_split, *_TEST_SPLITS) if entry.test_split else _TEST_SPLITS
    held_out = [name for name in wanted if name in splits]
    if "train" not in splits or not held_out:
        raise ValueError(
            f"{str(folder or entry.path)!r} has the splits {list(splits)}; 'train' and 'test' or 'validation' are needed: rename "
            "the files or folders in it."
        )
    roles = {"train": splits["train"], "test": splits[held_out[0]]}
    others = [name for name in held_out if name.startswith("valid") and name != held_out[0]]
    return roles | ({"validation": splits[others[0]]} if others else {})


def require_column(split: Any, name: str) -> None:
    """Check that a column exists.

    Raises:
        ValueError: it does not.
    """
    if name not in split.column_names:
        raise ValueError(f"column {name!r} is not in the data; allowed: one of {split.column_names}.")


def column(split: Any, name: str) -> list[Any]:
    """A column's values.

    Raises:
        ValueError: there is no such column.
    """
    require_column(split, name)
    return list(split[name][:])


def class_labels(split: Any, name: str) -> Tensor:
    """A column of classes as whole numbers (N,) from 0.

    Raises:
        ValueError: there is no such column, or it has other values, such as the -1 of unlabelled test sets.
    """
    values = np.asarray(column(split, name))
    wrong = values if values.dtype.kind not in "biu" else values[values < 0]
    if len(wrong):
        raise ValueError(
            f"column {name!r} has labels such as {wrong[0]}; allowed: whole numbers from 0. "
            "If the Hub's test split is unlabelled, give a folder with train and validation files."
        )
    return torch.from_numpy(values.astype("int64"))
