"""The paper's transformers: one pre-norm body with learned positions, and heads for classes, numbers and the next token."""

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
    """Settings of the body; the defaults are the paper's for regression and language.

    Args:
        length: the most positions of a sequence.
        num_attention_heads: heads.
        head_dim: width of a head.
        num_hidden_layers: blocks.
        intermediate_size: width of the MLP in a block, which the paper does not name; default: four times the width.
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
        """Width of the stream: that of all heads together."""
        return self.num_attention_heads * self.head_dim


class SequenceClassifierConfig(TransformerConfig):
    """Settings of `TransformerForSequenceClassification`; the defaults are the paper's for sequential MNIST, a pixel a position.

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
        input_size: numbers at each position; default: the clients of the electricity data.
        length: as in `TransformerConfig`; default: a week of hours, for the paper does not name it.
    """

    model_type = "teleport-sequence-regressor"

    def __init__(self, input_size: int = 321, length: int = 168, **kwargs: Any):
        self.input_size = input_size
        super().__init__(length=length, **kwargs)


class CausalLMConfig(TransformerConfig):
    """Settings of `TransformerForCausalLM`.

    Args:
        vocab_size: tokens; default: those of Penn Treebank.
    """

    model_type = "teleport-causal-lm"

    def __init__(self, vocab_size: int = 10_000, **kwargs: Any):
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Transformer(PreTrainedModel):
    """The body: what `embed` makes of each position, its place added, through the blocks and a last norm.

    Args:
        embed: from what is at a position to the width.
        outputs: numbers that the head gives.
        causal: whether a position attends only to itself and those before it.
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
            ValueError: the sequences are longer than there are positions.
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
    """At every position, forecasts what is at some later one, 24 hours on in the paper, from the positions up to it.

    Attention is causal, because for all but the last positions what is to be forecast lies inside the input.
    """

    config_class = SequenceRegressorConfig

    def __init__(self, config: SequenceRegressorConfig):
        embed = nn.Linear(config.input_size, config.hidden_size)
        super().__init__(config, embed, config.input_size, causal=True)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SeriesOutput:
        """Forecasts, as `logits`, and the mean squared error if there are labels; all (batch, length, input_size)."""
        logits = self.head(self.features(inputs))
        loss = None if labels is None else F.mse_loss(logits, labels)
        return SeriesOutput(loss=loss, logits=logits)


class TransformerForCausalLM(Transformer):
    """Says at every position which token is next; its vocabulary output is not tied to the embedding."""

    config_class = CausalLMConfig
    main_input_name = "input_ids"
    # The loss is a sum over tokens, divided by `num_items_in_batch` if Trainer gives it: the tokens of all accumulated batches.
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
            attention_mask: ones. Rows are full blocks, and a tokenizer may say so.
            labels: the tokens, not shifted, like `input_ids`; -100 is left out. With them there is a cross entropy.
            num_items_in_batch: what the sum over tokens is divided by; default: the number of labels, so that it is a mean.

        Raises:
            ValueError: an attention mask with zeros, or rows longer than there are positions.
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
