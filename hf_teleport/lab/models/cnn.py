"""The paper's small convolutional network: 3x3 convolutions with ReLU, max pooling after each, class logits."""

from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_teleport.lab.models.image_classifier import ImageClassifier


class CNNConfig(PreTrainedConfig):
    """Settings of `CNNForImageClassification`.

    Args:
        image_size: height and width. Each layer's pooling halves them.
        channels: colour channels of the image, then the channels of each layer.
    """

    model_type = "teleport-cnn"

    def __init__(self, image_size: int = 32, channels: tuple[int, ...] = (3, 16, 32, 64), **kwargs: Any):
        self.image_size = image_size
        self.channels = list(channels)
        super().__init__(**kwargs)


class CNNForImageClassification(ImageClassifier):
    """Classifies images with convolutions."""

    config_class = CNNConfig

    def __init__(self, config: CNNConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        for i, o in pairwise(config.channels):
            layers += [nn.Conv2d(i, o, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        side = config.image_size // 2 ** (len(config.channels) - 1)
        self.classifier = nn.Linear(config.channels[-1] * side**2, config.num_labels)
        self.post_init()
