"""Images and their classes as tensors in memory, from the catalogue, the Hub, a local folder, or scikit-learn's digits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_teleport.lab.data.catalogue import Source, find
from hf_teleport.lab.data.rows import class_labels, require_column, split_roles
from hf_teleport.reporting.extras import require_extra

# How many rows are decoded at once.
_DECODED_AT_ONCE = 1000


class ImageTensors(Dataset):
    """Images (N, channels, height, width) in float32 and labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = images
        self.labels = labels

    @property
    def num_labels(self) -> int:
        """Number of classes: the largest label plus one."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def first(self, count: int) -> "ImageTensors":
        """The first rows."""
        return ImageTensors(self.images[:count], self.labels[:count])


def load_images(
    source: str | Source,
    image_size: int | None = None,
    *,
    folder: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[ImageTensors, ImageTensors]:
    """Load training and test set. Each channel is scaled to mean 0 and standard deviation 1 over the training set.

    A channel that is constant becomes 0.

    Args:
        source: a name of the catalogue, a Hub id, a folder of image or parquet files in splits, or 'digits' (8x8, ships with
            scikit-learn, split 4 to 1 at random).
        image_size: resize to this height and width. Default: keep the size, which must be the same for all images.
        folder: a local copy of the data set.
        image_column: the column of images. Default: the first column of images.
        label_column: the column of classes. Default: the catalogue's, or the first class label.

    Raises:
        FileNotFoundError: the data are not stored here, and can't be downloaded.
        ModuleNotFoundError: `source` is 'digits', and scikit-learn is not installed.
        ValueError: no train split, no test or validation split, no image or label column, labels that are no classes, or images
            of several sizes.
    """
    entry = find(source)
    if entry.path == "digits" and folder is None:
        train, test = _digits()
    else:
        splits = split_roles(entry, folder)
        train, test = _decoded([splits["train"], splits["test"]], image_size, image_column, label_column or entry.label_column)
    mean = train.images.mean((0, 2, 3), keepdim=True)
    deviation = train.images.std((0, 2, 3), keepdim=True)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    for part in (train, test):
        # In place, because Tiny ImageNet alone takes 5 GiB.
        part.images.sub_(mean).div_(deviation)
    return train, test


def _digits() -> list[ImageTensors]:
    digits = require_extra("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1)
    data = ImageTensors(images, torch.tensor(digits.target[order]))
    split = len(data) * 4 // 5
    return [data.first(split), ImageTensors(data.images[split:], data.labels[split:])]


def _decoded(splits: list[Any], image_size: int | None, image: str | None, label: str | None) -> list[ImageTensors]:
    """The splits' images, with values between 0 and 1. They have one channel only if all images are grey."""
    from datasets import ClassLabel, Image

    features = splits[0].features
    image = image or next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    label = label or next((name for name, kind in features.items() if isinstance(kind, ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"an image and a class label column are needed, but the columns are {features}; name them.")
    parts = [_pictures(split, image, image_size) for split in splits]
    channels = max(chunk.shape[1] for chunks in parts for chunk in chunks)
    return [
        ImageTensors(_joined(chunks, channels), class_labels(split, label)) for chunks, split in zip(parts, splits, strict=True)
    ]


def _pictures(split: Any, image: str, image_size: int | None) -> list[Tensor]:
    """Images (N, 1 or 3, height, width) in uint8, in chunks."""
    from datasets import Image

    require_column(split, image)
    # A parquet file that `datasets` did not write has the encoded bytes without their type.
    split = split.select_columns([image]).cast_column(image, Image())
    chunks, sizes = [], set()
    for start in range(0, len(split), _DECODED_AT_ONCE):
        pictures = split[start : start + _DECODED_AT_ONCE][image]
        # Grey pictures in a colour set become colour.
        mode = "L" if all(picture.mode in ("1", "L") for picture in pictures) else "RGB"
        pictures = [picture.convert(mode) for picture in pictures]
        if image_size is not None:
            pictures = [picture.resize((image_size, image_size)) for picture in pictures]
        sizes |= {picture.size for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(f"column {image!r} has images of sizes {sorted(sizes)[:5]}: give image_size to resize them.")
        pixels = np.stack([np.asarray(picture).reshape(*picture.size[::-1], -1) for picture in pictures])
        chunks.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return chunks


def _joined(chunks: list[Tensor], channels: int) -> Tensor:
    """Chunks joined to images (N, channels, height, width) in float32, between 0 and 1."""
    images = torch.empty(sum(map(len, chunks)), channels, *chunks[0].shape[2:])
    for target, chunk in zip(images.split([len(chunk) for chunk in chunks]), chunks, strict=True):
        target.copy_(chunk)  # broadcasting repeats a grey chunk in each channel
    return images.div_(255)
