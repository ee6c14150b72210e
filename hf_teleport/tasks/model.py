"""Load a task's model and tokenizer, or make new ones."""

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
    """Load the configuration of a saved model, or make a new one.

    Args:
        fresh: settings for a new configuration only, such as the size of the vocabulary. `config_overrides` override them.
        settings: settings for both.

    Raises:
        ValueError: no model is named, it can't be loaded, or `config_overrides` are unknown or given for a saved model.
        FileNotFoundError: there is no such folder.
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
            f"config_overrides are for a new config_name such as bert or llama, but {name!r} is a saved model; leave them out."
        )
    argument = "config_name" if arguments.config_name else "model_name_or_path"
    return from_saved(AutoConfig.from_pretrained, argument, name, revision=arguments.model_revision, **settings)


def parse_overrides(text: dict[str, Any] | str | None) -> dict[str, Any]:
    """Parse 'hidden_size=64,depths=[1,2]' into a mapping. Values are YAML.

    Raises:
        ValueError: a part is not KEY=VALUE, or a value is not YAML.
    """
    if not text or isinstance(text, dict):
        return dict(text or {})
    # A comma inside brackets or braces, if they are not nested, belongs to a value.
    parts = [part.partition("=") for part in re.split(r",(?![^\[\]]*\]|[^{}]*\})", text)]
    if wrong := [key for key, equals, _ in parts if not equals]:
        raise ValueError(f"config_overrides has {wrong[0]!r}; allowed: KEY=VALUE,KEY=VALUE, for instance hidden_size=64.")
    return {key.strip(): from_yaml(value, f"the value of {key.strip()} in config_overrides") for key, _, value in parts}


def make_model(auto: Any, arguments: ModelArguments, config: Any, tokenizer: Any = None) -> Any:
    """Load the saved model, or make one with random weights. It gets an embedding for each of the tokenizer's tokens.

    Args:
        auto: one of Transformers' auto classes, or a model class.

    Raises:
        FileNotFoundError, ValueError: the saved model can't be loaded, or the sizes do not fit together.
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
    """Load the saved tokenizer, or make one whose tokens are the words of the training text. It has a token for padding.

    Args:
        texts: returns the training text, and is called only for a new tokenizer.
        masked: for BERT-like models, which have a <mask>, and a <cls> before every text.

    Raises:
        ValueError: no tokenizer is named, it can't be loaded, or it has no token that could pad.
        FileNotFoundError: there is no such folder.
    """
    if arguments.train_tokenizer_vocab_size is not None:
        return word_tokenizer(texts(), arguments.train_tokenizer_vocab_size, masked)
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        raise ValueError(
            "there is no tokenizer: give tokenizer_name = a folder or a Hub id, or train_tokenizer_vocab_size = a number of "
            "tokens, to make one from the training text."
        )
    argument = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
    tokenizer = from_saved(AutoTokenizer.from_pretrained, argument, name, revision=arguments.model_revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer {name!r} has no token for padding and none for the end of a text; give another tokenizer_name, "
                "or train_tokenizer_vocab_size to make one from the training text."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_settings(tokenizer: Any) -> dict[str, Any]:
    """The settings of a new configuration that depend on its tokenizer."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": start, "eos_token_id": end}
