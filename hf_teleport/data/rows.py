"""What the data modules share: rows held in memory as tensors, and the splits of a local folder or a Hub id."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

# The names under which a held-out split is looked for, best first.
_TEST_SPLITS = ("test", "validation", "valid")


class TensorRows(Dataset):
    """Named columns of the same length (N, ...); row i is the i-th entry of each.

    Raises:
        ValueError: no columns, or columns of different lengths.
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


def load_splits(source: str) -> Any:
    """The `datasets.DatasetDict` of a folder of parquet (or other) files, or of a Hub id.

    Raises:
        FileNotFoundError: a local path that does not exist.
    """
    from datasets import load_dataset

    folder = Path(source).expanduser()
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not folder.exists():
        raise FileNotFoundError(f"there is no folder {source!r}: give a local folder of parquet files, or a Hub id.")
    return load_dataset(str(folder) if folder.exists() else source)


def train_and_test(source: str) -> tuple[Any, Any]:
    """The training split of a source and its test split, or for want of one its validation split.

    Raises:
        FileNotFoundError: a local path that does not exist.
        ValueError: no train split, or no test and no validation split.
    """
    splits = load_splits(source)
    test = next((name for name in _TEST_SPLITS if name in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{source!r} has the splits {list(splits)}; 'train' and 'test' or 'validation' are needed.")
    return splits["train"], splits[test]


def column(split: Any, name: str) -> list[Any]:
    """A column's values.

    Raises:
        ValueError: there is no such column.
    """
    if name not in split.column_names:
        raise ValueError(f"column {name!r} is not in the data; allowed: one of {split.column_names}.")
    return list(split[name])
