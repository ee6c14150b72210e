"""Numeric tables as forecasting windows: from so many time steps, the next ones."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_teleport.data.rows import load_splits

# Shares of the time axis for training and validation; the rest is the test part.
_TRAIN, _VALIDATION = 0.7, 0.1


class SeriesWindows(Dataset):
    """Every window of a table (time, channels): `inputs` (context, channels) and, right after them, `labels` (horizon, channels).

    Raises:
        ValueError: the table is shorter than one window.
    """

    def __init__(self, values: Tensor, context: int, horizon: int):
        if len(values) < context + horizon:
            raise ValueError(
                f"context + horizon = {context} + {horizon} is not allowed; allowed: at most {len(values)}, the time steps that "
                "this part of the table has."
            )
        self.values = values
        self.context = context
        self.horizon = horizon

    def __len__(self) -> int:
        return len(self.values) - self.context - self.horizon + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(len(self))[index]
        now = start + self.context
        return {"inputs": self.values[start:now], "labels": self.values[now : now + self.horizon]}


def load_series(
    source: str, context: int, horizon: int, columns: list[str] | None = None
) -> tuple[SeriesWindows, SeriesWindows, SeriesWindows]:
    """Training, validation and test windows: the first 70 %, the next 10 % and the last 20 % of the time.

    A window lies within its part, so that no value is in two of them. Each channel is scaled by the training part's mean and
    deviation; one that is constant there is only shifted.

    Args:
        source: a folder with one unsplit data.parquet or train.parquet, rows in the order of time, or a Hub id.
        context: time steps that the model sees.
        horizon: time steps that it forecasts.
        columns: the channels; default: every numeric column.

    Raises:
        FileNotFoundError: a local path that does not exist.
        ValueError: several splits, no such column, no numeric column, missing values, or too few rows for a window.
    """
    splits = load_splits(source)
    if list(splits) != ["train"]:
        raise ValueError(f"{source!r} has the splits {list(splits)}; allowed: one unsplit table, which is split here by time.")
    frame = splits["train"].to_pandas()
    numeric = list(frame.select_dtypes("number").columns)
    if unknown := sorted(set(columns or []) - set(numeric)):
        raise ValueError(f"columns = {unknown} are not allowed; allowed: the numeric columns {numeric}.")
    values = torch.tensor(frame[columns or numeric].to_numpy(dtype="float32"))
    if not values.shape[1]:
        raise ValueError(f"{source!r} has no numeric column: its columns are {list(frame.columns)}.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{source!r} has missing or infinite values; fill them first, or leave out their columns.")
    first, second = round(len(values) * _TRAIN), round(len(values) * (_TRAIN + _VALIDATION))
    deviation = values[:first].std(0)
    scaled = (values - values[:first].mean(0)) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    parts = scaled[:first], scaled[first:second], scaled[second:]
    return tuple(SeriesWindows(part, context, horizon) for part in parts)  # type: ignore[return-value]
