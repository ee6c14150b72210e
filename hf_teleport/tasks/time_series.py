"""Forecasting of time series by Transformers' own models. The data are a table of numbers with a time step in each row."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from transformers import EvalPrediction, PatchTSMixerForPrediction, PatchTSTForPrediction, set_seed

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.inputs.rows import read_rows
from hf_teleport.lab.data import Source, load_series
from hf_teleport.tasks.arguments import ModelArguments, parse
from hf_teleport.tasks.model import make_config, make_model
from hf_teleport.tasks.run import run
from hf_teleport.tasks.tables import require_some

MODELS = {"patchtst": PatchTSTForPrediction, "patchtsmixer": PatchTSMixerForPrediction}


@dataclass
class SeriesArguments:
    """The table, its columns, and the lengths of a window."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a local folder with one table, instead of train_file."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Name of the data set, if the Hub id has several."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "File of the whole table: .csv, .json or .parquet, with rows in the order of time. The first 70 %% are for "
            "training, the next 10 %% for evaluation, and the last 20 %% for the test."
        },
    )
    target_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns to forecast. Default: all columns of numbers."}
    )
    context_length: int | None = field(default=None, metadata={"help": "Time steps that the model sees. Default: the config's."})
    prediction_length: int | None = field(default=None, metadata={"help": "Time steps to forecast. Default: the config's."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train only on the first windows, this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate only on the first windows, this many."})


class Forecasts(Dataset):
    """Windows under the names that the models expect: `past_values` and `future_values`, both (time, channels)."""

    def __init__(self, windows: Any):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        return {"past_values": window["inputs"], "future_values": window["labels"]}


def errors(prediction: EvalPrediction) -> dict[str, float]:
    """Mean squared and mean absolute error, in units of the training part's standard deviation."""
    differences = np.asarray(prediction.predictions) - np.asarray(prediction.label_ids)
    return {"mse": float(np.square(differences).mean()), "mae": float(np.abs(differences).mean())}


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics.

    Raises:
        ValueError: there is no table, or the model is not one of `MODELS`. Also as `load_series`.
    """
    kinds = (ModelArguments, SeriesArguments, TeleportTrainingArguments)
    model_args, data_args, training_args = parse("time_series", kinds, argv, __doc__)
    set_seed(training_args.seed)
    # The names of the columns that Trainer treats as labels.
    training_args.label_names = ["future_values"]

    if not (data_args.dataset_name or data_args.train_file):
        raise ValueError("there is no data to train on: give train_file = a .csv, .json or .parquet file, or dataset_name.")
    lengths = {name: value for name in ("context_length", "prediction_length") if (value := getattr(data_args, name)) is not None}
    config = make_config(model_args, lengths)
    if config.model_type not in MODELS:
        raise ValueError(f"config_name = {config.model_type!r} is not allowed; allowed: one of {list(MODELS)}.")
    if wrong := {name: value for name, value in lengths.items() if getattr(config, name) != value}:
        raise ValueError(
            f"{wrong} is not allowed; allowed: { ({name: getattr(config, name) for name in wrong}) }, as the saved model has. "
            "Leave it out, or give a config_name for a new model."
        )
    for name in ("max_train_samples", "max_eval_samples"):
        require_some(name, getattr(data_args, name))
    with training_args.main_process_first(desc="data"):
        argument = "dataset_name" if data_args.dataset_name else "train_file"
        source = str(getattr(data_args, argument))
        path = Path(source).expanduser()
        if path.is_file() or argument == "train_file":
            read_rows(argument, source)  # raises a clearer error if the file is wrong; the result is cached
        table = Source(str(path.resolve()) if path.is_file() else source, config=data_args.dataset_config_name)
        try:
            parts = load_series(table, config.context_length, config.prediction_length, data_args.target_columns)
        except ValueError as error:
            raise ValueError(f"{argument} = {source!r}: {error}") from error
    config.num_input_channels = parts[0].values.shape[1]
    limits = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_eval_samples)
    train, validation, test = (
        Subset(Forecasts(windows), range(min(len(windows), limit or len(windows))))
        for windows, limit in zip(parts, limits, strict=True)
    )

    trainer = TeleportTrainer(
        model=make_model(MODELS[config.model_type], model_args, config),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=errors,
        preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
    )
    measured = run(trainer, model_args, data_args)
    tested = trainer.evaluate(test, metric_key_prefix="test")
    trainer.log_metrics("test", tested)
    trainer.save_metrics("test", tested)
    return measured | tested
