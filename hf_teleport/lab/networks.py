"""The networks of experiments by name, and the settings of their configs that depend on the data."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    PreTrainedConfig,
)

from hf_teleport.lab import models  # noqa: F401 - puts the paper's networks into Transformers' Auto classes
from hf_teleport.lab.data import Pipeline


@dataclass(frozen=True)
class Network:
    """A model of Transformers, or one of the paper's networks, which are registered with Transformers.

    Attributes:
        kind: the kind of data that it takes.
        model_type: the name of its config.
        auto: the Auto class that makes or loads it.
        from_data: returns the config settings that the data decide.
    """

    kind: str
    model_type: str
    auto: Any
    from_data: Callable[[Pipeline], dict[str, Any]]

    @property
    def classifies(self) -> bool:
        """Whether it predicts a class for each row."""
        return self.auto in (AutoModelForImageClassification, AutoModelForSequenceClassification)

    @property
    def is_masked(self) -> bool:
        """Whether it is a masked language model."""
        return self.auto is AutoModelForMaskedLM

    def sizes(self) -> list[str]:
        """Names of its config's own settings."""
        bases = [base for base in CONFIG_MAPPING[self.model_type].__mro__ if issubclass(base, PreTrainedConfig)]
        of_all = inspect.signature(PreTrainedConfig).parameters
        names = dict.fromkeys(name for base in bases for name in inspect.signature(base).parameters)
        return [name for name in names if name not in ("kwargs", *of_all)]

    def config(self, **settings: Any) -> PreTrainedConfig:
        """Its config.

        Raises:
            ValueError: a value that is not allowed.
        """
        # Transformers has several names for some settings. Without this the name that is given last would win.
        names = CONFIG_MAPPING[self.model_type].attribute_map
        try:
            return AutoConfig.for_model(self.model_type, **{names.get(name, name): value for name, value in settings.items()})
        except StrictDataclassError as error:
            raise ValueError(f"sizes of {self.model_type!r}: {error}") from error


def _image(data: Pipeline) -> dict[str, Any]:
    return {"image_size": data.train[0]["pixel_values"].shape[-1], "num_labels": data.train.num_labels}  # type: ignore[attr-defined]


def _image_and_channels(data: Pipeline) -> dict[str, Any]:
    return {**_image(data), "num_channels": len(data.train[0]["pixel_values"])}


def _classes(data: Pipeline) -> dict[str, Any]:
    labels = data.train.columns["labels"]  # type: ignore[attr-defined]
    return {"num_labels": int(labels.max()) + 1}


def _sequence(data: Pipeline) -> dict[str, Any]:
    return {**_series(data), **_classes(data)}


def _series(data: Pipeline) -> dict[str, Any]:
    length, channels = data.train[0]["inputs"].shape
    return {"length": length, "input_size": channels}


def _forecast(data: Pipeline) -> dict[str, Any]:
    (context, channels), horizon = data.train[0]["inputs"].shape, len(data.train[0]["labels"])
    return {"context": context, "horizon": horizon, "channels": channels}


def _text(data: Pipeline) -> dict[str, Any]:
    return {"length": len(data.train[0]["input_ids"]), "vocab_size": len(data.tokenizer)}  # type: ignore[arg-type]


def _tokens(data: Pipeline) -> dict[str, Any]:
    sizes, tokenizer = _text(data), data.tokenizer
    return {
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["length"],
        "pad_token_id": tokenizer.pad_token_id,  # type: ignore[union-attr]
    }


def _next_token(data: Pipeline) -> dict[str, Any]:
    end = data.tokenizer.eos_token_id  # type: ignore[union-attr]
    return {**_tokens(data), "bos_token_id": end, "eos_token_id": end, "use_cache": False}


def _sentence(data: Pipeline) -> dict[str, Any]:
    return {**_tokens(data), **_classes(data)}


def _last_token(data: Pipeline) -> dict[str, Any]:
    return {**_next_token(data), **_classes(data)}


_IMAGES, _TEXTS, _WORDS = AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForCausalLM

NETWORKS: dict[str, Network] = {
    "mlp": Network("image", "teleport-mlp", _IMAGES, _image_and_channels),
    "cnn": Network("image", "teleport-cnn", _IMAGES, _image),
    "residual_cnn": Network("image", "teleport-residual-cnn", _IMAGES, _image),
    "transformer_classifier": Network("sequence", "teleport-sequence-classifier", _TEXTS, _sequence),
    "transformer_regressor": Network("series", "teleport-sequence-regressor", AutoModelForTimeSeriesPrediction, _series),
    "forecaster": Network("series", "teleport-series", AutoModelForTimeSeriesPrediction, _forecast),
    "transformer_lm": Network("text", "teleport-causal-lm", _WORDS, _text),
    "llama": Network("text", "llama", _WORDS, _next_token),
    "llama_classifier": Network("text", "llama", _TEXTS, _last_token),
    "qwen3": Network("text", "qwen3", _WORDS, _next_token),
    "gemma": Network("text", "gemma", _WORDS, _next_token),
    "gpt2": Network("text", "gpt2", _WORDS, _next_token),
    "bert": Network("text", "bert", _TEXTS, _sentence),
    "bert_mlm": Network("text", "bert", AutoModelForMaskedLM, _tokens),
    "vit": Network("image", "vit", _IMAGES, _image_and_channels),
}
