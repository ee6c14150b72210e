"""The paper's small convolutional network: 3x3 convolutions with ReLU, max pooling after each, class logits."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class CNNConfig(PreTrainedConfig):
    """Settings of `CNNForImageClassification`.

    Args:
        image_size: height and width; halved by each layer's pooling.
        channels: colour channels of the image, then those of each layer.
    """

    model_type = "teleport-cnn"

    def __init__(self, image_size: int = 32, channels: tuple[int, ...] = (3, 16, 32, 64), **kwargs: Any):
        self.image_size = image_size
        self.channels = list(channels)
        super().__init__(**kwargs)


class CNNForImageClassification(PreTrainedModel):
    """Classifies images (batch, channels, height, width) with convolutions."""

    config_class = CNNConfig
    # The loss is a mean over the batch: Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: CNNConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        for i, o in pairwise(config.channels):
            layers += [nn.Conv2d(i, o, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        side = config.image_size // 2 ** (len(config.channels) - 1)
        self.classifier = nn.Linear(config.channels[-1] * side**2, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (batch, num_labels), and the mean cross entropy if there are labels (batch,)."""
        logits = self.classifier(self.layers(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
