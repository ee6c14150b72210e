"""Models by name: saved ones from a folder or the Hub, new ones with random weights from a config name."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from safetensors import safe_open
from torch import nn

from hf_teleport.display.quantities import count, size
from hf_teleport.inputs.rows import read_rows, shortened
from hf_teleport.inputs.synthetic import synthetic_batch, synthetic_loss
from hf_teleport.lab.keys import require_known

_T = TypeVar("_T")

_ADAPTER = "adapter_config.json"
_WAYS = "give a folder as model.save_pretrained writes it, or a Hub id such as openai-community/gpt2"


def model_and_batch(
    name: str, sizes: list[str], data: Path | None, batch_size: int, length: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The named model, and a batch that it takes, for `hf-teleport inspect` and `doctor`.

    Args:
        name: as for `load_model`.
        sizes: each as KEY=VALUE.
        data: a file of rows; None: random inputs.
        batch_size, length: samples, and tokens in each if the inputs are random.

    Raises:
        FileNotFoundError, ValueError: as `load_model` and `read_rows`; rows that make no batch, or inputs that the model does
            not take.
    """
    model = load_model(name, dict(_setting(text) for text in sizes))
    batch = _first_rows(data, batch_size) if data else synthetic_batch(model, batch_size, length)
    try:
        with torch.no_grad():
            synthetic_loss(model, batch)
    except Exception as error:  # models raise all kinds of errors for inputs that do not suit them
        raise ValueError(
            f"{type(model).__name__} cannot take these inputs ({', '.join(batch)}): {shortened(error)}. Give rows that suit it "
            f"with --data, as training sees them (tokenised, for instance): {model.main_input_name}, and labels for the model's "
            "own loss. For a config name, give other sizes with --set."
        ) from error
    return model, batch


def load_model(name: str, sizes: dict[str, Any] | None = None) -> nn.Module:
    """A saved model from a folder or the Hub, or one with random weights from a config name. PEFT's adapters come on their base.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a name that is neither, files that cannot be loaded, sizes that make no model, or sizes for a saved model.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in CONFIG_MAPPING and not Path(name).exists():
        config = new_config(name, sizes or {}, "--set")
        if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
            # Saved models store this field, and without it a model computes no loss from labels.
            config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
        auto = next((auto for auto in _heads() if type(config) in auto._model_mapping), None)
        if auto is None:
            raise ValueError(
                f"Transformers has a config {name!r} but no model for it that this knows how to build; give the folder of a "
                "saved one, as model.save_pretrained(folder) writes it."
            )
        _check_memory(name, auto, config)
        return new_model(auto, config, "--set")
    if sizes:
        raise ValueError(
            f"--set gives the sizes of a config name, but {name!r} is none; known are llama, bert, vit, ... For a saved model "
            "leave --set out."
        )
    if Path(name, _ADAPTER).exists():
        return _adapted(name)
    config = from_saved(AutoConfig.from_pretrained, "model", name)
    heads = [getattr(transformers, head, None) for head in config.architectures or []]
    model_class = next((head for head in heads if head is not None), transformers.AutoModel)
    return from_saved(model_class.from_pretrained, "model", name)


def _adapted(name: str) -> nn.Module:
    from peft import PeftModel

    base = json.loads(Path(name, _ADAPTER).read_text())["base_model_name_or_path"]
    if not base:
        raise ValueError(
            f"model = {name!r} is an adapter whose {_ADAPTER} names no base model: write its folder or Hub id there, as "
            "base_model_name_or_path."
        )
    return from_saved(partial(PeftModel.from_pretrained, load_model(base)), "model", name)


def from_saved(load: Callable[..., _T], argument: str, name: str, **settings: Any) -> _T:
    """The result of `from_pretrained` for a folder or a Hub id; a failure is said in one line.

    Args:
        argument: the name of the argument that the user gave the name by, for errors.
        settings: of `load`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: files that are missing, broken or of another kind of model, or a Hub that is out of reach.
    """
    path, given = Path(name).expanduser(), f"{argument} = {name!r}"
    if path.is_file():
        raise ValueError(f"{given} is a file, which is not allowed; {_WAYS}.")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{given}: there is no such folder; {_WAYS}.")
    if path.is_dir() and not any(path.glob("*.json")):
        raise FileNotFoundError(f"{given} has no config.json or other JSON file; {_WAYS}.")
    try:
        return load(str(path) if path.exists() else name, **settings)
    except Exception as error:  # the type depends on the library that reads the files
        broken = _broken(path) if path.is_dir() else ""
        raise ValueError(f"{given} could not be loaded: {broken}{shortened(error).rstrip('.')}. To fix it, {_WAYS}.") from error


def _broken(folder: Path) -> str:
    """The first file of weights in a folder that is cut short or broken; empty: none is."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception:  # safetensors' own
            return f"{file.name} ({size(file.stat().st_size)}) is cut short or broken: "
    return ""


def new_config(name: str, overrides: dict[str, Any], argument: str, **settings: Any) -> Any:
    """A new configuration of a model type such as 'llama'.

    Args:
        overrides: settings of the user's, by the argument of this name.
        settings: others, over which the user's win.

    Raises:
        ValueError: an unknown key among the overrides, with the nearest one, or values that the configuration refuses.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    default = kind()
    for key in overrides:
        # A configuration accepts any name, so a misspelt one would have no effect.
        if not hasattr(default, key) and key not in settings:
            require_known(key, [*default.to_dict(), *kind.attribute_map], f"{argument} of {name!r}")
    try:
        # Sizes are not set on a finished configuration: sizes that follow from others (Llama's head_dim) would be
        # stale.
        return kind(**{**settings, **overrides})
    except Exception as error:  # configurations raise several types
        raise ValueError(f"{argument} = {overrides} is not allowed for {name!r}: {shortened(error)}") from error


def new_model(auto: Any, config: Any, argument: str) -> Any:
    """A model with random weights.

    Args:
        auto: one of Transformers' auto classes, or a model class.
        argument: the name of the argument by which the user chose its sizes, for errors.

    Raises:
        ValueError: the auto class has no model of this kind, or the sizes make none.
    """
    kind = config.model_type
    if type(config) not in getattr(auto, "_model_mapping", {type(config)}):
        raise ValueError(f"{kind!r} is not allowed; allowed: a model type that {auto.__name__} can make.")
    try:
        return auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    except Exception as error:  # the type depends on the layer that refuses its sizes
        raise ValueError(f"{argument} makes no {kind!r} model, correct its sizes: {shortened(error)}") from error


def _check_memory(name: str, auto: Any, config: Any) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in new_model(auto, config, "--set").parameters())
    # Weights, gradients, and copies of both; four bytes each.
    needed, free = 16 * parameters, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{name} has {count(parameters)} parameters by default, too many for this machine's memory ({size(needed)} needed, "
            f"{size(free)} free); give smaller sizes, for instance --set num_hidden_layers=2 hidden_size=256."
        )


def _heads() -> list[Any]:
    """Auto classes, the ones with the more informative loss first."""
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


def _first_rows(file: Path, number: int) -> dict[str, Any]:
    from transformers import default_data_collator

    rows = read_rows("--data", file)
    try:
        batch = default_data_collator([rows[i] for i in range(min(number, len(rows)))])
    except Exception as error:  # the type depends on the values that make no tensor
        raise ValueError(
            f"--data = {str(file)!r}: rows that make one batch must be numbers, and equally long, so tokenise and pad them: "
            f"{shortened(error)}"
        ) from error
    if not batch:
        raise ValueError(f"--data = {str(file)!r}: no column has numbers; allowed: rows as training sees them (tokenised).")
    return batch
