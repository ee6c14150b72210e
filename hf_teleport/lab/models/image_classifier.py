"""The base class of the image networks: flat features, a linear classifier, cross entropy."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class ImageClassifier(PreTrainedModel):
    """Classifies images (batch, channels, height, width). A subclass makes `layers`, with a flat output, and `classifier`."""

    main_input_name = "pixel_values"
    # The loss is a mean over the batch: Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (batch, num_labels), and the mean cross entropy if there are labels (batch,)."""
        logits = self.classifier(self.layers(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
