"""The paper's residual network: nine 3x3 convolutions with ReLU, three skip connections, strides instead of pooling."""

from itertools import groupby
from math import ceil
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu
from transformers import PreTrainedConfig

from hf_teleport.lab.models.image_classifier import ImageClassifier


class ResidualCNNConfig(PreTrainedConfig):
    """Settings of `ResidualCNNForImageClassification`.

    Args:
        image_size: height and width. Each stage halves them at its entry, rounding up.
        channels: colour channels of the image, then the channels of each convolution. Neighbours of equal width form a stage.

    Raises:
        ValueError: there is no convolution.
    """

    model_type = "teleport-residual-cnn"

    def __init__(
        self,
        image_size: int = 32,
        channels: tuple[int, ...] = (3, 64, 64, 64, 128, 128, 128, 256, 256, 256),
        **kwargs: Any,
    ):
        if len(channels) < 2:
            raise ValueError(
                f"channels = {list(channels)} is not allowed; allowed: the image's channels, then one number or more."
            )
        self.image_size = image_size
        self.channels = list(channels)
        super().__init__(**kwargs)


class ResidualStage(nn.Module):
    """Convolutions of one width. The first halves height and width. The output of the others is added to its output.

    Args:
        channels: input channels.
        width: channels of every convolution.
        count: number of convolutions. A stage of one has no skip connection.
    """

    def __init__(self, channels: int, width: int, count: int):
        super().__init__()
        self.entry = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1)
        branch: list[nn.Module] = []
        for _ in range(count - 1):
            branch += [nn.Conv2d(width, width, kernel_size=3, padding=1), nn.ReLU()]
        # The last ReLU comes after the sum.
        self.branch = nn.Sequential(*branch[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to half the height and width."""
        entered = relu(self.entry(images))
        return relu(entered + self.branch(entered)) if len(self.branch) else entered


class ResidualCNNForImageClassification(ImageClassifier):
    """Classifies images with stages of convolutions, each with a skip connection."""

    config_class = ResidualCNNConfig

    def __init__(self, config: ResidualCNNConfig):
        super().__init__(config)
        channels, *widths = config.channels
        stages: list[nn.Module] = []
        for width, group in groupby(widths):
            stages.append(ResidualStage(channels, width, len(list(group))))
            channels = width
        side = ceil(config.image_size / 2 ** len(stages))
        # Flattened and not averaged, because the paper names no pooling. The classifier then has 4096 features instead of 256,
        # so its inputs have a null space also on teleport batches of more than 256 images.
        self.layers = nn.Sequential(*stages, nn.Flatten())
        self.classifier = nn.Linear(channels * side**2, config.num_labels)
        self.post_init()
