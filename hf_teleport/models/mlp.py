"""The paper's multi-layer perceptron: flat image, hidden layers of 1024 with ReLU, class logits."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MLPConfig(PreTrainedConfig):
    """Settings of `MLPForImageClassification`.

    Args:
        image_size: height and width.
        num_channels: colour channels.
        hidden_sizes: width of each hidden layer.
    """

    model_type = "teleport-mlp"

    def __init__(self, image_size: int = 28, num_channels: int = 1, hidden_sizes: tuple[int, ...] = (1024, 1024), **kwargs: Any):
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class MLPForImageClassification(PreTrainedModel):
    """Classifies images (batch, channels, height, width) with fully connected layers."""

    config_class = MLPConfig
    # The loss is a mean over the batch: Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        hidden: list[nn.Module] = []
        for i, o in pairwise(sizes):
            hidden += [nn.Linear(i, o), nn.ReLU()]
        self.layers = nn.Sequential(nn.Flatten(), *hidden)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (batch, num_labels), and the mean cross entropy if there are labels (batch,)."""
        logits = self.classifier(self.layers(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
