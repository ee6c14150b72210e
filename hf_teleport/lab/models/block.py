"""The pre-norm transformer block that all sequence models in this folder use."""

from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Attention and MLP. Each reads the residual stream through a layer norm, and adds its output to the stream.

    Args:
        width: width of the residual stream.
        heads: number of heads, a divisor of the width.
        intermediate_size: width of the MLP.
        causal: whether a position attends only to itself and earlier positions.
    """

    def __init__(self, width: int, heads: int, intermediate_size: int, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.attention_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Maps (batch, length, width) to the same shape."""
        x = self.attention_norm(stream)
        # (batch, length, width) -> (batch, heads, length, width of a head)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        stream = stream + self.o_proj(mixed)
        return stream + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(stream))))
