"""A small pre-norm transformer that forecasts series. It maps (context, channels) to (horizon, channels)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_teleport.lab.models.block import TransformerBlock


class SeriesConfig(PreTrainedConfig):
    """Settings of `SeriesTransformer`.

    Args:
        channels: numbers at each time step.
        context: time steps that the model sees.
        horizon: time steps that it forecasts.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads, a divisor of the width.
        intermediate_size: width of the MLP in a block.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """

    model_type = "teleport-series"

    def __init__(
        self,
        channels: int = 7,
        context: int = 96,
        horizon: int = 24,
        hidden_size: int = 64,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        **kwargs: Any,
    ):
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {num_attention_heads} is not allowed; allowed: a divisor of hidden_size = {hidden_size}."
            )
        self.channels = channels
        self.context = context
        self.horizon = horizon
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        super().__init__(**kwargs)


@dataclass
class SeriesOutput(ModelOutput):
    """The forecast (batch, time steps, channels), and the mean squared error if there are labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class SeriesTransformer(PreTrainedModel):
    """Forecasts the next steps of a series from the features at the last input step."""

    config_class = SeriesConfig
    # The loss is a mean over the batch: Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: SeriesConfig):
        super().__init__(config)
        self.embed = nn.Linear(config.channels, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(config.context, config.hidden_size))
        self.layers = nn.ModuleList(
            TransformerBlock(config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.horizon * config.channels)
        self.post_init()

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SeriesOutput:
        """Forecast (batch, horizon, channels) from inputs (batch, context, channels). With labels also the mean squared error."""
        stream = self.embed(inputs) + self.positions
        for layer in self.layers:
            stream = layer(stream)
        forecast = self.head(self.norm(stream[:, -1])).unflatten(-1, (self.config.horizon, self.config.channels))
        loss = None if labels is None else F.mse_loss(forecast, labels)
        return SeriesOutput(loss=loss, logits=forecast)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, SeriesTransformer):
            nn.init.normal_(module.positions, std=0.02)
