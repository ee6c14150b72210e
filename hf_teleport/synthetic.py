"""A batch of random inputs for a Transformers model, read off its forward's signature and its config."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def synthetic_batch(model: nn.Module, batch_size: int = 2, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the kinds that Transformers models take: tokens, images, audio, and labels for a loss.

    Args:
        model: a Transformers model; its main input decides.
        batch_size: samples.
        length: tokens of a sequence.
        seed: the same seed gives the same batch.

    Raises:
        ValueError: an input that this does not know how to make; give data instead.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))

    def tokens() -> Tensor:
        size = getattr(config.get_text_config(), "vocab_size", 100)
        return torch.randint(min(3, size - 1), size, (batch_size, length), generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    def image() -> Tensor:
        side = getattr(config, "image_size", 64)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return normal(getattr(config, "num_channels", 3), height, width)

    makers = {
        "input_ids": tokens,
        "pixel_values": image,
        "input_values": lambda: normal(4000),
        "input_features": lambda: normal(getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)),
    }
    if main not in makers:
        raise ValueError(
            f"{type(model).__name__} takes {main!r}, for which there are no random inputs; known are {', '.join(makers)}. "
            "Give rows of data with --data."
        )
    batch = {main: makers[main]()}
    if main == "pixel_values" and "input_ids" in accepted:
        batch["input_ids"] = tokens()
    if "labels" in accepted:
        batch["labels"] = _labels(model, batch.get("input_ids", tokens()), batch_size)
    elif getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = tokens()
    return batch


def _labels(model: nn.Module, ids: Tensor, batch_size: int) -> Tensor:
    """Classes for a classifier, tokens for a language model."""
    kind = type(model).__name__
    classes = torch.arange(batch_size) % max(1, getattr(model.config, "num_labels", 2))
    if "TokenClassification" in kind:
        return torch.zeros_like(ids)
    return classes if "Classification" in kind else ids


def synthetic_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss, or the mean square of its floating-point outputs if it has none."""
    outputs = model(**batch)
    loss = outputs.get("loss")
    if loss is not None:
        return loss.mean()
    tensors = [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.stack([value.square().mean() for value in tensors]).sum()
