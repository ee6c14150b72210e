"""Numeric tables as forecasting windows: a number of time steps, and the later time steps to forecast."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_teleport.lab.data.catalogue import Source, find
from hf_teleport.lab.data.rows import column, load_splits


class SeriesWindows(Dataset):
    """Every window of a table (time, channels): `inputs` (context, channels) and `labels` (horizon, channels).

    Args:
        values: the table (time, channels).
        context: time steps of the inputs.
        horizon: time steps of the labels.
        shift: so many steps after the inputs' beginning the labels begin; default: `context`, right after the inputs. With
            horizon = context the labels are the inputs' window at a later time.

    Raises:
        ValueError: a length below 1, or a table shorter than one window.
    """

    def __init__(self, values: Tensor, context: int, horizon: int, shift: int | None = None):
        shift = context if shift is None else shift
        for name, steps in (("context", context), ("horizon", horizon), ("shift", shift)):
            if steps < 1:
                raise ValueError(f"{name} = {steps} is not allowed; allowed: 1 or more time steps.")
        self.span = max(context, shift + horizon)
        if len(values) < self.span:
            name = f"context + horizon = {context}" if shift == context else f"shift + horizon = {shift}"
            raise ValueError(
                f"{name} + {horizon} is not allowed; allowed: at most {len(values)}, the time steps that "
                "this part of the table has."
            )
        self.values = values
        self.context = context
        self.horizon = horizon
        self.shift = shift

    def __len__(self) -> int:
        return len(self.values) - self.span + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(len(self))[index]
        later = start + self.shift
        return {"inputs": self.values[start : start + self.context], "labels": self.values[later : later + self.horizon]}


def load_series(
    source: str | Source,
    context: int,
    horizon: int,
    columns: list[str] | None = None,
    *,
    shift: int | None = None,
    shares: tuple[float, float] = (0.7, 0.1),
    folder: str | Path | None = None,
    split: str | None = None,
    series_column: str | None = None,
) -> tuple[SeriesWindows, SeriesWindows, SeriesWindows]:
    """Training, validation and test windows: by default the first 70 %, the next 10 % and the last 20 % of the time.

    A window lies within its part, so that no value is in two of them. Each channel is scaled by the training part's mean and
    deviation; one that is constant there is only shifted.

    Args:
        source: a name of the catalogue, a Hub id, a file, or a folder with one unsplit data.parquet or train.parquet; rows in the
            order of time.
        context: time steps that the model sees.
        horizon: time steps that it forecasts.
        columns: the channels; default: every numeric column.
        shift: steps from the beginning of the inputs to that of the labels; default: `context`.
        shares: of the time axis, for training and validation; the rest is the test part.
        folder: a local copy of what `source` names.
        split: the split that has the whole time axis, where the data come in several.
        series_column: for data with a channel in each row: the column with its values in the order of time.

    Raises:
        FileNotFoundError: the data are neither here nor within reach.
        ValueError: several splits, no such split or column, no numeric column, missing values, series of several lengths, shares
            beyond the whole, or too few rows for a window.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise ValueError(f"shares = {shares} is not allowed; allowed: two positive numbers that leave a rest below 1.")
    entry = find(source)
    name = str(folder or entry.path)
    splits = load_splits(entry, folder)
    if split is None and list(splits) != ["train"]:
        raise ValueError(
            f"{name!r} has the splits {list(splits)}; allowed: one unsplit table, which is split here by time. "
            "Where one of them has all of the time, give it as `split`."
        )
    if split is not None and split not in splits:
        raise ValueError(f"split = {split!r} is not allowed; allowed: one of {list(splits)}.")
    rows = splits[split or "train"]
    values = _channels(rows, name, columns) if series_column is None else _transposed(rows, series_column, columns)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name!r} has missing or infinite values; fill them first, or leave out their columns.")
    first, second = round(len(values) * shares[0]), round(len(values) * sum(shares))
    deviation = values[:first].std(0)
    scaled = (values - values[:first].mean(0)) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    parts = scaled[:first], scaled[first:second], scaled[second:]
    return tuple(SeriesWindows(part, context, horizon, shift) for part in parts)  # type: ignore[return-value]


def _channels(rows: Any, name: str, columns: list[str] | None) -> Tensor:
    """A table with a time step in each row, as (time, channels)."""
    frame = rows.to_pandas()
    numeric = list(frame.select_dtypes("number").columns)
    if unknown := sorted(set(columns or []) - set(numeric)):
        raise ValueError(f"columns = {unknown} are not allowed; allowed: the numeric columns {numeric}.")
    if not numeric:
        raise ValueError(
            f"{name!r} has no numeric column: its columns are {list(frame.columns)}. Where a column has a whole series in "
            "each row, name it as `series_column`."
        )
    return torch.tensor(frame[columns or numeric].to_numpy(dtype="float32"))


def _transposed(rows: Any, series_column: str, columns: list[str] | None) -> Tensor:
    """A table with a channel in each row, as (time, channels)."""
    if columns is not None:
        raise ValueError(f"columns = {columns} is not allowed; allowed: None with series_column, whose channels have no names.")
    series = [np.asarray(values, dtype="float32") for values in column(rows.with_format("numpy"), series_column)]
    lengths = sorted({values.size for values in series})
    if len(lengths) > 1 or series[0].ndim != 1:
        raise ValueError(
            f"column {series_column!r} has series of {lengths[:5]} steps; allowed: lists of numbers, all of one length."
        )
    return torch.from_numpy(np.stack(series, axis=1))
