"""The paper's multi-layer perceptron: flat image, hidden layers of 1024 with ReLU, class logits."""

from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from hf_teleport.lab.models.image_classifier import ImageClassifier


class MLPConfig(PreTrainedConfig):
    """Settings of `MLPForImageClassification`.

    Args:
        image_size: height and width.
        num_channels: colour channels.
        hidden_sizes: width of each hidden layer.
        hidden_act: the activation, by its name in Transformers. Method 'symmetry' needs an invertible one, such as "leaky_relu".

    Raises:
        ValueError: Transformers has no such activation.
    """

    model_type = "teleport-mlp"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 1,
        hidden_sizes: tuple[int, ...] = (1024, 1024),
        hidden_act: str = "relu",
        **kwargs: Any,
    ):
        if hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act = {hidden_act!r} is not allowed; allowed: one of {', '.join(ACT2FN)}.")
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.hidden_act = hidden_act
        super().__init__(**kwargs)


class MLPForImageClassification(ImageClassifier):
    """Classifies images with fully connected layers."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        hidden: list[nn.Module] = []
        for i, o in pairwise(sizes):
            hidden += [nn.Linear(i, o), ACT2FN[config.hidden_act]]
        self.layers = nn.Sequential(nn.Flatten(), *hidden)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()
