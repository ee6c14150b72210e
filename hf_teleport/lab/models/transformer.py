"""The paper's transformers: a pre-norm body with learned positions, and heads for classes, numbers and the next token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from hf_teleport.lab.models.block import TransformerBlock
from hf_teleport.lab.models.series import SeriesOutput


class TransformerConfig(PreTrainedConfig):
    """Settings of the body. The defaults are the paper's for regression and language.

    Args:
        length: the largest number of positions in a sequence.
        num_attention_heads: number of heads.
        head_dim: width of a head.
        num_hidden_layers: number of blocks.
        intermediate_size: width of the MLP in a block. Default: four times the width, because the paper does not name it.
    """

    def __init__(
        self,
        length: int = 128,
        num_attention_heads: int = 4,
        head_dim: int = 64,
        num_hidden_layers: int = 4,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ):
        self.length = length
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = 4 * self.hidden_size if intermediate_size is None else intermediate_size
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, equal to the width of all heads together."""
        return self.num_attention_heads * self.head_dim


class SequenceClassifierConfig(TransformerConfig):
    """Settings of `TransformerForSequenceClassification`. The defaults are the paper's for sequential MNIST, by single pixels.

    Args:
        input_size: numbers at each position.
        length, num_attention_heads, num_hidden_layers: as in `TransformerConfig`.
    """

    model_type = "teleport-sequence-classifier"

    def __init__(
        self, input_size: int = 1, length: int = 784, num_attention_heads: int = 2, num_hidden_layers: int = 2, **kwargs: Any
    ):
        self.input_size = input_size
        super().__init__(length=length, num_attention_heads=num_attention_heads, num_hidden_layers=num_hidden_layers, **kwargs)


class SequenceRegressorConfig(TransformerConfig):
    """Settings of `TransformerForSequenceRegression`.

    Args:
        input_size: numbers at each position. Default: 321, the clients of the electricity data.
        length: as in `TransformerConfig`. Default: a week of hours, because the paper does not name it.
    """

    model_type = "teleport-sequence-regressor"

    def __init__(self, input_size: int = 321, length: int = 168, **kwargs: Any):
        self.input_size = input_size
        super().__init__(length=length, **kwargs)


class CausalLMConfig(TransformerConfig):
    """Settings of `TransformerForCausalLM`.

    Args:
        vocab_size: number of tokens. Default: 10,000, as in Penn Treebank.
    """

    model_type = "teleport-causal-lm"

    def __init__(self, vocab_size: int = 10_000, **kwargs: Any):
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Transformer(PreTrainedModel):
    """The body: embedding plus learned position, the blocks, and a last norm. Subclasses use its features and its head.

    Args:
        embed: maps the input at a position to the width.
        outputs: number of outputs of the head.
        causal: whether a position attends only to itself and earlier positions.
    """

    main_input_name = "inputs"
    # The loss is a mean over the batch: Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False
    _input_embed_layer = "embed"

    def __init__(self, config: TransformerConfig, embed: nn.Module, outputs: int, causal: bool):
        super().__init__(config)
        width = config.hidden_size
        self.embed = embed
        self.positions = nn.Parameter(torch.empty(config.length, width))
        self.layers = nn.ModuleList(
            TransformerBlock(width, config.num_attention_heads, config.intermediate_size, causal)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = nn.Linear(width, outputs)
        self.post_init()

    def features(self, inputs: Tensor) -> Tensor:
        """Features (batch, length, width) of inputs (batch, length, ...).

        Raises:
            ValueError: the sequences have more positions than the model.
        """
        length = inputs.shape[1]
        if length > self.config.length:
            raise ValueError(
                f"a sequence of {length} positions is not allowed; allowed: at most length = {self.config.length}. "
                "Cut the sequences, or give the config a larger length."
            )
        stream = self.embed(inputs) + self.positions[:length]
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Transformer):
            nn.init.normal_(module.positions, std=0.02)


class TransformerForSequenceClassification(Transformer):
    """Classifies sequences (batch, length, input_size) by the mean of the features of all positions."""

    config_class = SequenceClassifierConfig

    def __init__(self, config: SequenceClassifierConfig):
        super().__init__(config, nn.Linear(config.input_size, config.hidden_size), config.num_labels, causal=False)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SequenceClassifierOutput:
        """Logits (batch, num_labels), and the mean cross entropy if there are labels (batch,)."""
        logits = self.head(self.features(inputs).mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TransformerForSequenceRegression(Transformer):
    """Forecasts at every position the values at a later time (in the paper, 24 hours later) from the positions so far.

    Attention is causal, because the input contains the values to forecast, except for the last positions.
    """

    config_class = SequenceRegressorConfig

    def __init__(self, config: SequenceRegressorConfig):
        embed = nn.Linear(config.input_size, config.hidden_size)
        super().__init__(config, embed, config.input_size, causal=True)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SeriesOutput:
        """Forecasts as `logits`, and the mean squared error if there are labels. All have shape (batch, length, input_size)."""
        logits = self.head(self.features(inputs))
        loss = None if labels is None else F.mse_loss(logits, labels)
        return SeriesOutput(loss=loss, logits=logits)


class TransformerForCausalLM(Transformer):
    """Predicts the next token at every position. Its output head is not tied to the embedding."""

    config_class = CausalLMConfig
    main_input_name = "input_ids"
    # The loss is a sum over tokens. Trainer's `num_items_in_batch`, the tokens of all accumulated batches, divides it.
    accepts_loss_kwargs = True

    def __init__(self, config: CausalLMConfig):
        super().__init__(config, nn.Embedding(config.vocab_size, config.hidden_size), config.vocab_size, causal=True)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (batch, length, vocab_size) of tokens (batch, length).

        Args:
            attention_mask: only ones are allowed, because rows are full blocks.
            labels: the tokens, not shifted, as in `input_ids`. -100 is left out. With labels the loss is a cross entropy.
            num_items_in_batch: divisor of the sum over tokens. Default: the number of labels, so that the loss is a mean.

        Raises:
            ValueError: the attention mask has zeros, or rows have more positions than the model.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask = a mask with zeros is not allowed; allowed: ones. Cut the text into full blocks, or pad on the "
                "right, with labels of -100 and without a mask: attention is causal, so padding changes nothing before it."
            )
        logits = self.head(self.features(input_ids))
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)
