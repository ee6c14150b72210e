"""Batches of random inputs for tiny architectures, one function for each kind of input."""

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

BATCH = 2
LENGTH = 7
VOCAB = 60
IMAGE_TOKEN = VOCAB - 1
STATES = 6  # of the decision transformer's environment
ACTIONS = 2


def token_ids(length: int = LENGTH) -> Tensor:
    """Neither padding, bos, eos (0, 1, 2), nor the image token."""
    return torch.randint(3, IMAGE_TOKEN, (BATCH, length))


def classes() -> Tensor:
    return torch.arange(BATCH)


def text_classification() -> Batch:
    return {"input_ids": token_ids(), "labels": classes()}


def language_modelling() -> Batch:
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


def text_to_text() -> Batch:
    return {"input_ids": token_ids(), "labels": token_ids()}


def layout_classification() -> Batch:
    return text_classification() | {"bbox": torch.tensor([1, 2, 5, 9]).expand(BATCH, LENGTH, 4)}


def table_classification() -> Batch:
    return text_classification() | {"token_type_ids": torch.randint(0, 2, (BATCH, LENGTH, 7))}


def byte_classification() -> Batch:
    return {"inputs": token_ids(), "labels": classes()}


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def image_classification(size: int = 32) -> Batch:
    return {"pixel_values": images(size), "labels": classes()}


def video_classification() -> Batch:
    return {"pixel_values": torch.randn(BATCH, 2, 3, 32, 32), "labels": classes()}


def semantic_segmentation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "labels": torch.randint(0, 2, (BATCH, size, size))}


def depth_estimation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "labels": 1 + torch.rand(BATCH, size, size)}


def detection(size: int = 64) -> Batch:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2]])
    return {"pixel_values": images(size), "labels": [{"class_labels": classes(), "boxes": boxes} for _ in range(BATCH)]}


def instance_segmentation(size: int = 64) -> Batch:
    masks = torch.zeros(2, size, size)
    masks[0, : size // 2] = masks[1, size // 2 :] = 1
    return {"pixel_values": images(size), "mask_labels": [masks] * BATCH, "class_labels": [classes()] * BATCH}


def prompted_segmentation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "input_points": size * torch.rand(BATCH, 1, 1, 2)}


def speech_recognition(samples: int = 400) -> Batch:
    return {"input_values": torch.randn(BATCH, samples), "labels": token_ids(4)}


def spectrogram_to_text(*shape: int) -> Batch:
    return {"input_features": torch.randn(BATCH, *shape), "labels": token_ids()}


def spectrogram_classification() -> Batch:
    return {"input_values": torch.randn(BATCH, 24, 16), "labels": classes()}


def waveform() -> Batch:
    return {"input_values": torch.randn(BATCH, 1, 64)}


def forecast_with_lags() -> Batch:
    """A context of 8 and lags up to 3 before it, to predict 4."""
    return {
        "past_values": torch.randn(BATCH, 11),
        "past_time_features": torch.randn(BATCH, 11, 1),
        "past_observed_mask": torch.ones(BATCH, 11),
        "future_values": torch.randn(BATCH, 4),
        "future_time_features": torch.randn(BATCH, 4, 1),
    }


def forecast(*channels: int) -> Batch:
    return {"past_values": torch.randn(BATCH, 16, *channels), "future_values": torch.randn(BATCH, 4, *channels)}


def image_text_pairs() -> Batch:
    return {"input_ids": token_ids(), "pixel_values": images(), "return_loss": True}


def image_with_text() -> Batch:
    return {"input_ids": token_ids(), "pixel_values": images()}


def captioning() -> Batch:
    return language_modelling() | {"pixel_values": images()}


def visual_question() -> Batch:
    return image_with_text() | {"labels": torch.rand(BATCH, 2)}


def image_prompt() -> Batch:
    """A prompt that starts with the tokens which the 16 patches of the image replace."""
    ids = torch.cat([torch.full((BATCH, 16), IMAGE_TOKEN), token_ids()], dim=1)
    return {"input_ids": ids, "labels": ids, "pixel_values": images()}


def image_prefix() -> Batch:
    batch = image_prompt()
    return batch | {"token_type_ids": (batch["input_ids"] != IMAGE_TOKEN).long()}


def trajectories() -> Batch:
    return {
        "states": torch.randn(BATCH, LENGTH, STATES),
        "actions": torch.randn(BATCH, LENGTH, ACTIONS),
        "rewards": torch.randn(BATCH, LENGTH, 1),
        "returns_to_go": torch.randn(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, LENGTH),
    }
