"""Which column of a table has the texts, labels, images or sounds, and which values it may have.

Errors begin with `source`, which says where the rows are from: "train_file = 'rows.csv'".
"""

import math
from typing import Any

from datasets import ClassLabel, Value

from hf_teleport.inputs.rows import shortened


def text_column(rows: Any, name: str | None, source: str) -> str:
    """The column that has a text in every row: the one named, or 'text', or the first with texts.

    Raises:
        ValueError: no such column, or a row without a text; the message names the first one.
    """
    if name is None:
        texts = [column for column, feature in rows.features.items() if _is_text(feature)]
        name = "text" if "text" in rows.column_names or not texts else texts[0]
    _require_column(rows, name, source)
    if _is_text(rows.features[name]) and not rows.data.column(name).null_count:
        return name
    for number, value in enumerate(rows[name], 1):
        if not isinstance(value, str):
            raise ValueError(
                f"{source}: row {number} has {shortened(value)} in column {name!r}; allowed: a text in every row (in CSV an "
                "empty cell, NA, null and None are none). Correct the row, take it out, or name another column."
            )
    return name


def label_column(rows: Any, name: str | None, source: str) -> str:
    """The column that has a label in every row: the one named, or the first of the type `ClassLabel`, or 'label'.

    Raises:
        ValueError: no such column, values that are no labels, or a row without one.
    """
    typed = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    column = name or (typed[0] if typed else "label")
    _require_values(rows, column, source)
    feature = rows.features[column]
    if not isinstance(feature, ClassLabel | Value):
        example = shortened(next(iter(rows[column]), None))
        raise ValueError(
            f"{source}: column {column!r} has values such as {example}; allowed: classes by name or number, or floats."
        )
    return column


def file_column(rows: Any, name: str | None, kind: Any, source: str) -> str:
    """The column of images or sounds: the one named, or the first of this type of `datasets`, or the one with the
    type's name.

    Args:
        kind: `datasets.Image` or `datasets.Audio`.

    Raises:
        ValueError: no such column, values that are no files, or a row without one.
    """
    typed = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    column = name or (typed[0] if typed else kind.__name__.lower())
    _require_values(rows, column, source)
    feature = rows.features[column]
    # Files that `datasets` did not write have paths, or encoded bytes, without their type.
    paths = isinstance(feature, Value) and ("string" in feature.dtype or "binary" in feature.dtype)
    if not (isinstance(feature, kind) or paths or (isinstance(feature, dict) and "bytes" in feature)):
        raise ValueError(f"{source}: column {column!r} has values of the type {feature}; allowed: encoded bytes, or paths.")
    return column


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _require_column(rows: Any, column: str, source: str) -> None:
    if column not in rows.column_names:
        raise ValueError(f"{source}: column {column!r} is not in the data; allowed: one of {rows.column_names}.")


def _require_values(rows: Any, column: str, source: str) -> None:
    """Check that no row has null, NaN or an infinite number in a column."""
    _require_column(rows, column, source)
    feature = rows.features[column]
    is_float = isinstance(feature, Value) and "float" in feature.dtype
    if not is_float and not rows.data.column(column).null_count:
        return
    for number, value in enumerate(rows[column], 1):
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{source}: row {number} has {value} in column {column!r}; allowed: finite numbers.")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(
                f"{source}: row {number} has no value in column {column!r}; correct the row, take it out, or name another column."
            )
