"""Images read pixel by pixel: sequential MNIST and its like."""

import math
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from hf_teleport.lab.data.catalogue import Source
from hf_teleport.lab.data.images import load_images
from hf_teleport.lab.data.rows import TensorRows


def load_sequences(
    source: str | Source,
    length: int | None = None,
    *,
    folder: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[TensorRows, TensorRows]:
    """Training and test rows: `inputs` (N, length, channels), the pixels line by line, and `labels` (N,).

    The pixels are scaled as `load_images` does it.

    Args:
        source: as for `load_images`.
        length: pixels in a sequence; default: all of them, 784 for MNIST. Fewer are means over squares of pixels, so that
            196 stands for MNIST of 14 x 14.
        folder: a local copy of what `source` names.
        image_column: default: the first column of images.
        label_column: default: the catalogue's, or the first class label.

    Raises:
        FileNotFoundError: the data are neither here nor within reach.
        ValueError: as for `load_images`, or a length for which the images cannot be cut into squares.
    """
    train, test = load_images(source, folder=folder, image_column=image_column, label_column=label_column)
    return tuple(TensorRows(inputs=_pixels(part.images, length), labels=part.labels) for part in (train, test))  # type: ignore[return-value]


def _pixels(images: Tensor, length: int | None) -> Tensor:
    height, width = images.shape[2:]
    common = math.gcd(height, width)
    squares = {height * width // side**2: side for side in range(1, common + 1) if common % side == 0}
    length = length or height * width
    if length not in squares:
        raise ValueError(f"length = {length} is not allowed; allowed for images of {height} x {width}: one of {list(squares)}.")
    return F.avg_pool2d(images, squares[length]).flatten(2).transpose(1, 2).contiguous()
