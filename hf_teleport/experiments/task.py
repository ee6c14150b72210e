"""What is trained on what: the data part and the model part of an experiment."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedConfig, PreTrainedModel

from hf_teleport.data import Pipeline, load
from hf_teleport.data.catalogue import KINDS, find
from hf_teleport.experiments.keys import require_known
from hf_teleport.models import (
    CausalLMConfig,
    CNNConfig,
    CNNForImageClassification,
    MLPConfig,
    MLPForImageClassification,
    ResidualCNNConfig,
    ResidualCNNForImageClassification,
    SequenceClassifierConfig,
    SequenceRegressorConfig,
    TransformerForCausalLM,
    TransformerForSequenceClassification,
    TransformerForSequenceRegression,
)

# What `data.load` takes for each kind of data.
OPTIONS: dict[str, tuple[str, ...]] = {
    "image": ("image_size", "image_column", "label_column"),
    "sequence": ("length", "image_column", "label_column"),
    "series": ("context", "horizon", "shift", "shares", "columns", "split", "series_column"),
    "text": ("text_column", "label_column", "length", "vocabulary_size"),
}


@dataclass(frozen=True)
class Network:
    """One of the paper's networks.

    Attributes:
        kind: of the data that it takes.
        config, model: its classes.
        from_data: the sizes that the data decide.
    """

    kind: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    from_data: Callable[[Pipeline], dict[str, Any]]

    def sizes(self) -> list[str]:
        """Names of the settings of its config, from the inputs' to the labels'."""
        own = [base for base in self.config.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
        names = dict.fromkeys(name for base in own for name in inspect.signature(base).parameters)
        return [name for name in names if name != "kwargs"]


def _image(data: Pipeline) -> dict[str, Any]:
    return {"image_size": data.train[0]["pixel_values"].shape[-1], "num_labels": data.train.num_labels}  # type: ignore[attr-defined]


def _image_and_channels(data: Pipeline) -> dict[str, Any]:
    return {**_image(data), "num_channels": len(data.train[0]["pixel_values"])}


def _sequence(data: Pipeline) -> dict[str, Any]:
    labels = data.train.columns["labels"]  # type: ignore[attr-defined]
    return {**_series(data), "num_labels": int(labels.max()) + 1}


def _series(data: Pipeline) -> dict[str, Any]:
    length, channels = data.train[0]["inputs"].shape
    return {"length": length, "input_size": channels}


def _text(data: Pipeline) -> dict[str, Any]:
    return {"length": len(data.train[0]["input_ids"]), "vocab_size": len(data.tokenizer)}  # type: ignore[arg-type]


NETWORKS: dict[str, Network] = {
    "mlp": Network("image", MLPConfig, MLPForImageClassification, _image_and_channels),
    "cnn": Network("image", CNNConfig, CNNForImageClassification, _image),
    "residual_cnn": Network("image", ResidualCNNConfig, ResidualCNNForImageClassification, _image),
    "transformer_classifier": Network("sequence", SequenceClassifierConfig, TransformerForSequenceClassification, _sequence),
    "transformer_regressor": Network("series", SequenceRegressorConfig, TransformerForSequenceRegression, _series),
    "transformer_lm": Network("text", CausalLMConfig, TransformerForCausalLM, _text),
}


@dataclass(frozen=True)
class Task:
    """A data set, a network for it, and how much of both.

    Args:
        dataset: a name of the catalogue, a Hub id, or a local folder, as for `data.load`.
        model: 'mlp', 'cnn', 'residual_cnn', 'transformer_classifier', 'transformer_regressor' or 'transformer_lm'.
        folder: a local copy of what `dataset` names.
        kind: of the data; default: the catalogue's.
        options: of `data.load`, those in `OPTIONS`.
        sizes: settings of the network's config, whose defaults are the paper's. Image size, classes, length, channels of a series
            and vocabulary come from the data.
        train_rows: train on so many rows, evenly spread over the training set; default: all.
        test_rows: test on so many rows, evenly spread; default: all.
        train_loss_rows: measure the training loss on so many of the training rows, evenly spread.

    Raises:
        ValueError: a model that there is not, or that does not take such data; an option or a size that there is not.
    """

    dataset: str
    model: str
    folder: str | None = None
    kind: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    train_rows: int | None = None
    test_rows: int | None = None
    train_loss_rows: int = 10_000

    def __post_init__(self) -> None:
        if self.model not in NETWORKS:
            raise ValueError(f"model = {self.model!r} is not allowed; allowed: one of {list(NETWORKS)}.")
        if self.kind not in (None, *KINDS):
            raise ValueError(f"kind = {self.kind!r} is not allowed; allowed: one of {list(KINDS)}.")
        network, kind = NETWORKS[self.model], self.kind or find(self.dataset).kind
        if kind != network.kind:
            suited = [name for name, other in NETWORKS.items() if other.kind == kind]
            raise ValueError(
                f"model = {self.model!r} takes data of kind {network.kind!r}, but those of dataset = {self.dataset!r} are of "
                f"kind {kind!r}; allowed: {suited or f'a kind, one of {list(KINDS)}'}."
            )
        for name in self.options:
            require_known(name, OPTIONS[kind], f"data of kind {kind!r}")
        for name in self.sizes:
            require_known(name, network.sizes(), f"sizes of model {self.model!r}")
        network.config(**self.sizes)
        for name in ("train_rows", "test_rows", "train_loss_rows"):
            rows = getattr(self, name)
            if rows is not None and (not isinstance(rows, int) or rows < 1):
                raise ValueError(f"{name} = {rows!r} is not allowed; allowed: a whole number from 1.")

    def load(self) -> Pipeline:
        """The data, all rows of them.

        Raises:
            FileNotFoundError, ValueError: as `data.load`.
        """
        return load(self.dataset, self.folder, self.kind, **self.options)

    def make_model(self, data: Pipeline) -> PreTrainedModel:
        """A fresh model, with random weights from torch's generator."""
        network = NETWORKS[self.model]
        return network.model(network.config(**{**network.from_data(data), **self.sizes}))


def evenly(rows: Any, count: int | None) -> Dataset:
    """So many rows, evenly spread over the set; all of them if there are not more, or without a count."""
    if count is None or count >= len(rows):
        return rows
    return Subset(rows, [i * len(rows) // count for i in range(count)])
