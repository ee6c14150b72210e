"""Image classification data from a Hub id, a local folder, or scikit-learn's digits, held in memory as tensors."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Rows decoded at a time.
_DECODED_AT_ONCE = 1000


class ImageTensors(Dataset):
    """Images (N, channels, height, width) in float32 and labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = images
        self.labels = labels

    @property
    def num_labels(self) -> int:
        """Number of classes: the largest label and one."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def first(self, count: int) -> "ImageTensors":
        """The first rows."""
        return ImageTensors(self.images[:count], self.labels[:count])


def load_images(source: str, image_size: int | None = None) -> tuple[ImageTensors, ImageTensors]:
    """Training and test set, each channel scaled to mean 0 and deviation 1 over the training set.

    Args:
        source: 'digits' (8x8, ships with scikit-learn, split 4 to 1 at random), a folder of image or parquet files in splits,
            or a Hub id. The columns are found by their type: an image, and a class label.
        image_size: resize to this height and width; default: as they are, which must then be of one size.

    Raises:
        ValueError: no train split, no test or validation split, or no image or label column.
        FileNotFoundError: a local path that does not exist.
    """
    if source == "digits":
        train, test = _digits()
    else:
        if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).expanduser().exists():
            raise FileNotFoundError(
                f"there is no folder {source!r}: give a local folder with train and test files, a Hub id such as "
                "'ylecun/mnist', or 'digits'."
            )
        train, test = _from_datasets(str(Path(source).expanduser()), image_size)
    mean = train.images.mean((0, 2, 3), keepdim=True)
    deviation = train.images.std((0, 2, 3), keepdim=True)
    return tuple(ImageTensors((part.images - mean) / deviation, part.labels) for part in (train, test))  # type: ignore[return-value]


def _digits() -> tuple[ImageTensors, ImageTensors]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1)
    data = ImageTensors(images, torch.tensor(digits.target[order]))
    split = len(data) * 4 // 5
    return data.first(split), ImageTensors(data.images[split:], data.labels[split:])


def _from_datasets(source: str, image_size: int | None) -> tuple[ImageTensors, ImageTensors]:
    from datasets import load_dataset

    splits = load_dataset(source)
    test_split = next((name for name in ("test", "validation", "valid") if name in splits), None)
    if "train" not in splits or test_split is None:
        raise ValueError(f"{source!r} has the splits {list(splits)}; 'train' and 'test' or 'validation' are needed.")
    return _to_tensors(splits["train"], image_size), _to_tensors(splits[test_split], image_size)


def _to_tensors(split, image_size: int | None) -> ImageTensors:  # type: ignore[no-untyped-def]
    from datasets import ClassLabel, Image

    image = next((name for name, kind in split.features.items() if isinstance(kind, Image)), None)
    label = next((name for name, kind in split.features.items() if isinstance(kind, ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"an image and a class label column are needed, but the columns are {split.features}.")
    parts = []
    for start in range(0, len(split), _DECODED_AT_ONCE):
        pictures = split[start : start + _DECODED_AT_ONCE][image]
        # Grey pictures in a colour set become colour.
        mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
        pictures = [picture.convert(mode) for picture in pictures]
        if image_size is not None:
            pictures = [picture.resize((image_size, image_size)) for picture in pictures]
        parts.append(np.stack([np.asarray(picture).reshape(*picture.size[::-1], -1) for picture in pictures]))
    images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).float() / 255
    return ImageTensors(images.contiguous(), torch.tensor(list(split[label])))
