"""A batch of random inputs for a Transformers model, from its forward's signature and its config."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Heads whose labels are tokens, and heads whose labels are classes. Others (boxes, masks, depth maps) get no labels.
_TOKEN_HEADS = ("CausalLM", "LMHeadModel", "MaskedLM", "ForPreTraining", "ConditionalGeneration", "CTC")
_CLASS_HEADS = ("SequenceClassification", "ImageClassification", "AudioClassification")


def synthetic_batch(model: nn.Module, batch_size: int = 2, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the kinds that Transformers models take: tokens, images, video, audio, and labels if they are simple.

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
        vision = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
        side = getattr(vision, "image_size", 64)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        frames = [vision.num_frames] if hasattr(vision, "num_frames") else []
        return normal(*frames, getattr(vision, "num_channels", 3), height, width)

    def wave() -> Tensor:
        spectrogram = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
        return normal(config.max_length, config.num_mel_bins) if spectrogram else normal(4000)

    def features() -> Tensor:
        if hasattr(config, "input_feat_per_channel"):
            return normal(4 * length, config.input_feat_per_channel * config.input_channels)
        return normal(getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500))

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": tokens,
        "pixel_values": image,
        "input_values": wave,
        "input_features": features,
    }
    if main not in makers:
        raise ValueError(
            f"{type(model).__name__} takes {main!r}, for which there are no random inputs; known are {', '.join(makers)}. "
            "Give rows of data with --data."
        )
    wanted = [main]
    if "pixel_values" in accepted and "input_ids" in accepted:
        wanted = ["input_ids", "pixel_values"]
    batch = {name: makers[name]() for name in wanted}
    kind = type(model).__name__
    if "labels" in accepted and kind.endswith(_TOKEN_HEADS):
        batch["labels"] = batch.get("input_ids", tokens())
    elif "labels" in accepted and kind.endswith(_CLASS_HEADS):
        batch["labels"] = torch.arange(batch_size) % max(1, config.num_labels)
    elif getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = tokens()
    return batch


def synthetic_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss, or the mean square of its floating-point outputs if it has none."""
    outputs = model(**batch)
    loss = outputs.get("loss")
    if loss is not None:
        return loss.mean()
    tensors = [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.stack([value.square().mean() for value in tensors]).sum()
