"""Windows of numeric time series for forecasting: some time steps as inputs, and later time steps as labels."""

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
        shift: steps from the first input to the first label. Default: `context`, so the labels follow right after the inputs.
            With horizon = context the labels are the inputs' window at a later time.

    Raises:
        ValueError: a length is below 1, or the table is shorter than one window.
    """

    def __init__(self, values: Tensor, context: int, horizon: int, shift: int | None = None):
        shift = context if shift is None else shift
        for name, steps in (("context", context), ("horizon", horizon), ("shift", shift)):
            if steps < 1:
                raise ValueError(f"{name} = {steps} is not allowed; allowed: 1 or more time steps.")
        self.span = max(context, shift + horizon)
        if len(values) < self.span:
            name = f"context + horizon = {context}" if shift == context else f"shift + horizon = {shift}"
            asked = f"context = {context}" if context > shift + horizon else f"{name} + {horizon}"
            raise ValueError(
                f"{asked} is not allowed; allowed: at most {len(values)}, the time steps that this part of the table has."
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
    """Training, validation and test windows. By default they are the first 70 %, the next 10 % and the last 20 % of the time.

    A window lies within its part, so no value is in two parts. Each channel is scaled by mean and standard deviation of the
    training part. A channel that is constant there is only shifted.

    Args:
        source: a name of the catalogue, a Hub id, a file, or a folder with one unsplit data.parquet or train.parquet. Rows must
            be in the order of time.
        context: time steps that the model sees.
        horizon: time steps that it forecasts.
        columns: the channels. Default: all numeric columns.
        shift: steps from the first input to the first label. Default: `context`.
        shares: shares of the time axis for training and validation. The rest is the test part.
        folder: a local copy of the data set.
        split: the split that has the whole time axis, if the data have several splits.
        series_column: for data with a channel in each row: the column with its values in the order of time.

    Raises:
        FileNotFoundError: the data are not stored here, and can't be downloaded.
        ValueError: several splits, no such split or column, no numeric column, missing values, series of several lengths, shares
            that exceed the whole, or too few rows for a window.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise ValueError(f"shares = {shares} is not allowed; allowed: two positive numbers that leave a rest below 1.")
    entry = find(source)
    name = str(folder or entry.path)
    splits = load_splits(entry, folder)
    if split is None and list(splits) != ["train"]:
        raise ValueError(
            f"{name!r} has the splits {list(splits)}; allowed: one unsplit table, which is split here by time. "
            "If one of them has the whole time axis, give it as `split`."
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
    """Rows that are time steps, as a tensor (time, channels)."""
    frame = rows.to_pandas()
    numeric = list(frame.select_dtypes("number").columns)
    if unknown := sorted(set(columns or []) - set(numeric)):
        raise ValueError(f"columns = {unknown} are not allowed; allowed: the numeric columns {numeric}.")
    if not numeric:
        raise ValueError(
            f"{name!r} has no numeric column: its columns are {list(frame.columns)}. If a column has a whole series in each "
            "row, name it as `series_column`."
        )
    return torch.tensor(frame[columns or numeric].to_numpy(dtype="float32"))


def _transposed(rows: Any, series_column: str, columns: list[str] | None) -> Tensor:
    """Rows that are channels, as a tensor (time, channels)."""
    if columns is not None:
        raise ValueError(f"columns = {columns} is not allowed; allowed: None with series_column, whose channels have no names.")
    series = [np.asarray(values, dtype="float32") for values in column(rows.with_format("numpy"), series_column)]
    lengths = sorted({values.size for values in series})
    if len(lengths) > 1 or series[0].ndim != 1:
        raise ValueError(
            f"column {series_column!r} has series of {lengths[:5]} steps; allowed: lists of numbers, all of one length."
        )
    return torch.from_numpy(np.stack(series, axis=1))
