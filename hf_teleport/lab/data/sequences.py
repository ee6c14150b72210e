"""Images as sequences of pixels, such as sequential MNIST."""

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

    The pixels are scaled as in `load_images`.

    Args:
        source: as for `load_images`.
        length: pixels in a sequence. Default: all, 784 for MNIST. With fewer, a pixel is the mean over a square, so 196 gives
            MNIST of 14 x 14.
        folder: a local copy of the data set.
        image_column: the column of images. Default: the first column of images.
        label_column: the column of classes. Default: the catalogue's, or the first class label.

    Raises:
        FileNotFoundError: the data are not stored here, and can't be downloaded.
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
