"""Read a column of labels: as classes with names, or as numbers for a regression."""

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel

from hf_teleport.inputs.columns import label_column

# Class numbers may be at most this many times the number of classes. A file may lack some of the classes.
_SPARSE = 1000


@dataclass(frozen=True)
class Labels:
    """The classes of a column.

    Attributes:
        column: name of the column.
        names: names of the classes, in the order of their numbers. Empty for a regression.
        values: the column's value for each class, in the order of their numbers.
    """

    column: str
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, rows: Any, column: str | None = None) -> "Labels":
        """The classes of a column. None: the column that `label_column` finds.

        Raises:
            ValueError: as `label_column`; or there is a single class, or class numbers are below 0 (unlabelled test sets have -1)
                or leave out most numbers.
        """
        column = label_column(rows, column, "the training rows")
        kind = rows.features[column]
        if isinstance(kind, ClassLabel):
            return cls(column, tuple(kind.names), tuple(range(len(kind.names))))
        if "float" in kind.dtype:
            return cls(column, (), ())
        values = sorted(rows.unique(column))
        if len(values) < 2:
            raise ValueError(f"column {column!r} has the one label {values[0]!r}; allowed: two classes or more.")
        if not isinstance(values[0], str):
            if values[0] < 0:
                raise ValueError(f"column {column!r} has labels such as {values[0]}; allowed: whole numbers from 0, or names.")
            if values[-1] > _SPARSE * len(values):
                raise ValueError(
                    f"column {column!r} has {len(values)} classes with numbers up to {values[-1]}; allowed: numbers from 0 with "
                    "few gaps, names, or floats for a regression."
                )
            values = list(range(values[-1] + 1))
        return cls(column, tuple(map(str, values)), tuple(values))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a model's configuration that depend on the classes."""
        if not self.names:
            return {"num_labels": 1, "problem_type": "regression"}
        numbered = dict(enumerate(self.names))
        return {"id2label": numbered, "label2id": {name: number for number, name in numbered.items()}}

    def numbers(self, labels: list[Any]) -> list[Any]:
        """Convert labels to the numbers of their classes. Labels of a regression stay as they are.

        Raises:
            ValueError: the training rows do not have such a label.
        """
        if not self.names:
            return labels
        number = {value: i for i, value in enumerate(self.values)}
        if unknown := [label for label in labels if label not in number]:
            raise ValueError(
                f"column {self.column!r} has the label {unknown[0]!r}; allowed: labels of the training rows, {self.names[:20]}. "
                "If a test split is unlabelled, give a validation_file."
            )
        return [number[label] for label in labels]
