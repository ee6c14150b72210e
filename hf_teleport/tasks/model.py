"""The model and the tokenizer of a task: saved ones, or new ones."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from hf_teleport.inputs.models import from_saved, new_config, new_model
from hf_teleport.lab.data import word_tokenizer
from hf_teleport.lab.keys import from_yaml
from hf_teleport.tasks.arguments import ModelArguments, TextModelArguments


def make_config(arguments: ModelArguments, fresh: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The configuration of a saved model, or a new one.

    Args:
        fresh: settings of a new configuration alone, such as the size of the vocabulary; `config_overrides` win.
        settings: of either.

    Raises:
        ValueError: no model named, one that cannot be loaded, or `config_overrides` that are unknown, or of a saved model.
        FileNotFoundError: no such folder.
    """
    name = arguments.config_name or arguments.model_name_or_path
    if name is None:
        raise ValueError(
            "there is no model: give model_name_or_path = a folder or a Hub id, or for random weights "
            "config_name = a model type such as bert, gpt2, llama, t5, vit, wav2vec2, patchtst."
        )
    overrides = parse_overrides(arguments.config_overrides)
    if name in CONFIG_MAPPING and not Path(name).exists():
        return new_config(name, overrides, "config_overrides", **{**(fresh or {}), **settings})
    if overrides:
        raise ValueError(
            f"config_overrides are for a new config_name such as bert or llama, but {name!r} is a saved one; leave them out."
        )
    argument = "config_name" if arguments.config_name else "model_name_or_path"
    return from_saved(AutoConfig.from_pretrained, argument, name, revision=arguments.model_revision, **settings)


def parse_overrides(text: dict[str, Any] | str | None) -> dict[str, Any]:
    """'hidden_size=64,depths=[1,2]' as a mapping; values are read as YAML.

    Raises:
        ValueError: a part that is no KEY=VALUE, or a value that is not YAML.
    """
    if not text or isinstance(text, dict):
        return dict(text or {})
    # Commas inside brackets belong to a list.
    parts = [part.partition("=") for part in re.split(r",(?![^\[\]]*\])", text)]
    if wrong := [key for key, equals, _ in parts if not equals]:
        raise ValueError(f"config_overrides has {wrong[0]!r}; allowed: KEY=VALUE,KEY=VALUE, for instance hidden_size=64.")
    return {key.strip(): from_yaml(value, f"the value of {key.strip()} in config_overrides") for key, _, value in parts}


def make_model(auto: Any, arguments: ModelArguments, config: Any, tokenizer: Any = None) -> Any:
    """The saved model, or one with random weights, and an embedding for each of the tokenizer's tokens.

    Args:
        auto: one of Transformers' auto classes, or a model class.

    Raises:
        FileNotFoundError, ValueError: a saved model that cannot be loaded, or sizes that make no model.
    """
    if arguments.model_name_or_path is None:
        return new_model(auto, config, "config_overrides" if arguments.config_overrides else "config_name")
    model = from_saved(
        auto.from_pretrained,
        "model_name_or_path",
        arguments.model_name_or_path,
        config=config,
        revision=arguments.model_revision,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
    )
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return model


def make_tokenizer(arguments: TextModelArguments, texts: Callable[[], list[str]], masked: bool = False) -> Any:
    """The saved tokenizer, or a new one whose tokens are the words of the training text; with a token for padding.

    Args:
        texts: called for the training text if a new one is wanted.
        masked: for BERT-like models, which have a <mask>, and a <cls> before every text.

    Raises:
        ValueError: no tokenizer named, one that cannot be loaded, or one without a token that could pad.
        FileNotFoundError: no such folder.
    """
    if arguments.train_tokenizer_vocab_size is not None:
        return word_tokenizer(texts(), arguments.train_tokenizer_vocab_size, masked)
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        raise ValueError(
            "there is no tokenizer: give tokenizer_name = a folder or a Hub id, or train_tokenizer_vocab_size = how many tokens "
            "to make of the training text."
        )
    argument = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
    tokenizer = from_saved(AutoTokenizer.from_pretrained, argument, name, revision=arguments.model_revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer {name!r} has no token for padding and none for the end of a text; give another tokenizer_name, "
                "or train_tokenizer_vocab_size to make one of the training text."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_settings(tokenizer: Any) -> dict[str, Any]:
    """The settings of a new configuration that follow from its tokenizer."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": start, "eos_token_id": end}
