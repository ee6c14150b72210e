"""A model by its name, and a batch that it takes: what `hf-teleport inspect` and `doctor` look at."""

import json
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from hf_teleport.commands.synthetic import synthetic_batch, synthetic_loss
from hf_teleport.lab.keys import require_known


def model_and_batch(
    name: str, sizes: list[str], data: Path | None, batch_size: int, length: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that was named, and a batch that it takes.

    Args:
        name: as for `load_model`.
        sizes: each as KEY=VALUE.
        data: a file of rows; None: random inputs.
        batch_size, length: samples, and tokens in each if the inputs are random.

    Raises:
        ValueError: as `load_model`; rows that make no batch, or inputs that the model does not take.
    """
    model = load_model(name, dict(_setting(text) for text in sizes))
    batch = _rows(data, batch_size) if data else synthetic_batch(model, batch_size, length)
    try:
        with torch.no_grad():
            synthetic_loss(model, batch)
    except Exception as error:  # whatever a model says to inputs that do not suit it
        raise ValueError(
            f"{type(model).__name__} cannot take these inputs ({', '.join(batch)}): {error}. Give rows that suit it with --data, "
            f"as training sees them (tokenised, for instance): {model.main_input_name}, and labels for the model's own loss."
        ) from error
    return model, batch


def load_model(name: str, sizes: dict[str, Any] | None = None) -> nn.Module:
    """A saved model from a folder or the Hub, or one with random weights from a config name.

    Raises:
        ValueError: a name that is neither, or sizes for a saved model.
        OSError: the Hub cannot be reached, or has no such model.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in CONFIG_MAPPING and not Path(name).exists():
        config = _config(CONFIG_MAPPING[name], name, sizes or {})
        for auto in _heads():
            if type(config) in auto._model_mapping:
                _check_memory(name, auto, config)
                return auto.from_config(config)
        raise ValueError(
            f"Transformers has a config {name!r} but no model for it that this knows how to build; give the folder of a saved "
            "one, as model.save_pretrained(folder) writes it."
        )
    if sizes:
        raise ValueError(
            f"--set gives the sizes of a config name, but {name!r} is none; known are llama, bert, vit, ... For a saved model "
            "leave --set out."
        )
    config = AutoConfig.from_pretrained(name)
    heads = [getattr(transformers, head, None) for head in config.architectures or []]
    model_class = next((head for head in heads if head is not None), transformers.AutoModel)
    return model_class.from_pretrained(name)


def _config(kind: Any, name: str, sizes: dict[str, Any]) -> Any:
    # A config takes any name, and a misspelt one would change nothing.
    default = kind()
    for key in sizes:
        if not hasattr(default, key):
            require_known(key, [*default.to_dict(), *kind.attribute_map], f"--set, for {name!r}")
    try:
        return kind(**sizes)
    except Exception as error:  # of whatever kind a config raises
        raise ValueError(f"--set {sizes} is not allowed for {name!r}: {error}") from error


def _check_memory(name: str, auto: Any, config: Any) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    # Weights, gradients, and copies of both; four bytes each.
    if 16 * count > psutil.virtual_memory().available:
        raise ValueError(
            f"{name} has {count:.2g} parameters by default, too many for this machine's memory; give smaller sizes, for instance "
            "--set num_hidden_layers=2 hidden_size=256."
        )


def _heads() -> list[Any]:
    """Auto classes by how telling their loss is."""
    import transformers

    names = ["CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "AudioClassification", "SequenceClassification"]
    return [getattr(transformers, f"AutoModelFor{name}") for name in names] + [transformers.AutoModel]


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r}: write KEY=VALUE, for instance hidden_size=64.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _rows(file: Path, count: int) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import default_data_collator

    kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}.get(file.suffix)
    if kind is None or not file.exists():
        raise ValueError(f"--data {str(file)!r}: give an existing .parquet, .json, .jsonl or .csv file.")
    rows = load_dataset(kind, data_files=str(file), split="train")
    try:
        return default_data_collator([rows[i] for i in range(min(count, len(rows)))])
    except ValueError as error:
        raise ValueError(f"--data {str(file)!r}: rows that make one batch must be equally long, so pad them: {error}") from error
