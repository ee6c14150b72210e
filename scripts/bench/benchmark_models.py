"""The models that `benchmark.py` measures: MLP, CNN, ViT, GPT-2 and Llama of any width and depth, on random inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_teleport.lab.models import CNNConfig, CNNForImageClassification, MLPConfig, MLPForImageClassification
from hf_teleport.weights.snapshot import Snapshot

Batch = dict[str, Tensor]

SAMPLES, VOCABULARY = 200, 8000
QUICK_SAMPLES, QUICK_VOCABULARY = 16, 100


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


class Work:
    """A model with AdamW, which has its state already, and batches to draw.

    Args:
        samples: how many are in the batch of a step.
        draw: a batch of so many samples.
    """

    def __init__(self, model: nn.Module, samples: int, draw: Callable[[int], Batch], device: torch.device):
        self.model, self.samples, self._draw, self.device = model.to(device), samples, draw, device
        self.batch = self.draw(samples)
        # With a rate of 0 a step costs what it always does, and the weights stay.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        self._weights = Snapshot(model.parameters())
        self.train_step(update=True)
        self.restore()

    def draw(self, samples: int) -> Batch:
        return {key: value.to(self.device) for key, value in self._draw(max(1, samples)).items()}

    def train_step(self, update: bool) -> None:
        """Forward and backward, and with `update` a step of AdamW."""
        self.model.train()
        self.optimizer.zero_grad()
        loss_fn(self.model, self.batch).backward()
        if update:
            self.optimizer.step()

    def restore(self) -> None:
        """The first weights again, and no gradients."""
        self._weights.restore()
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes that are there whatever is measured: weights, AdamW's state, the batch."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state, *self.batch.values()))


def build(name: str, device: torch.device, quick: bool = False) -> Work:
    """A model by its name, FAMILY-WIDTHxDEPTH, with random weights.

    Raises:
        ValueError: a name that is none.
    """
    torch.manual_seed(0)
    try:
        family, size = name.split("-")
        width, depth = map(int, size.split("x"))
        make = FAMILIES[family]
    except (ValueError, KeyError):
        allowed = f"FAMILY-WIDTHxDEPTH, for instance llama-256x4, with a family of {', '.join(FAMILIES)}"
        raise ValueError(f"model = {name!r} is not allowed; allowed: {allowed}.") from None
    samples, vocabulary = (QUICK_SAMPLES, QUICK_VOCABULARY) if quick else (SAMPLES, VOCABULARY)
    model, samples, draw = make(width, depth, samples, vocabulary)
    return Work(model, samples, draw, device)


Made = tuple[nn.Module, int, Callable[[int], Batch]]


def mlp(width: int, depth: int, samples: int, vocabulary: int = 0, image_size: int = 28) -> Made:
    """The paper's, but for an activation that has an inverse: symmetry teleportation needs one."""
    config = MLPConfig(image_size=image_size, hidden_sizes=(width,) * depth, hidden_act="leaky_relu", num_labels=10)
    return MLPForImageClassification(config), samples, partial(_images, 1, image_size)


def _cnn(width: int, depth: int, samples: int, vocabulary: int) -> Made:
    config = CNNConfig(channels=(3, *(width * 2**i for i in range(depth))), num_labels=10)
    return CNNForImageClassification(config), samples, partial(_images, 3, config.image_size)


def _vit(width: int, depth: int, samples: int, vocabulary: int) -> Made:
    config = ViTConfig(**_body(width, depth), intermediate_size=4 * width, image_size=32, patch_size=8, num_labels=10)
    tokens_of_image = 17
    return ViTForImageClassification(config), max(1, _length(width) // tokens_of_image), partial(_images, 3, 32)


def _gpt2(width: int, depth: int, samples: int, vocabulary: int) -> Made:
    # Without dropout, a training step is at its fastest.
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**_body(width, depth), **dropout, **_language(vocabulary), n_positions=width)
    return GPT2LMHeadModel(config), _length(width), partial(_tokens, vocabulary)


def _llama(width: int, depth: int, samples: int, vocabulary: int) -> Made:
    config = LlamaConfig(**_body(width, depth), **_language(vocabulary), intermediate_size=width * 8 // 3 // 8 * 8)
    return LlamaForCausalLM(config), _length(width), partial(_tokens, vocabulary)


FAMILIES: dict[str, Callable[[int, int, int, int], Made]] = {
    "mlp": mlp,
    "cnn": _cnn,
    "vit": _vit,
    "gpt2": _gpt2,
    "llama": _llama,
}


def _body(width: int, depth: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": max(1, width // 64)}


def _language(vocabulary: int) -> dict[str, Any]:
    return {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "use_cache": False}


def _length(width: int) -> int:
    """Tokens in a batch: fewer than the width, so that the inputs of every layer leave a null space."""
    return width // 2


def _images(channels: int, size: int, samples: int) -> Batch:
    return {"pixel_values": torch.randn(samples, channels, size, size), "labels": torch.randint(10, (samples,))}


def _tokens(vocabulary: int, length: int) -> Batch:
    """One sequence."""
    ids = torch.randint(vocabulary, (1, length))
    return {"input_ids": ids, "labels": ids}
