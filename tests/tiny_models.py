"""Tiny Transformers models with random weights, each with a batch that gives a loss."""

import torch
import transformers as tf
from torch import nn

VOCAB, LENGTH, BATCH = 29, 7, 3


def _tokens(generator):
    return torch.randint(2, VOCAB, (BATCH, LENGTH), generator=generator)


def _text(labels):
    def batch(generator):
        ids = _tokens(generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}

    return batch


def _language(ids):
    return ids


def _classes(ids):
    return torch.arange(len(ids)) % 2


def _images(generator):
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator), "labels": torch.arange(BATCH) % 2}


_GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "vocab_size": VOCAB}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": 16,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 2,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
_MAMBA = {"hidden_size": 24, "state_size": 4, "num_hidden_layers": 2, "vocab_size": VOCAB, "use_mambapy": False}

MODELS = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, _GPT2, _text(_language)),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA, _text(_language)),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, _BERT, _text(_classes)),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, _T5, _text(_language)),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, _VIT, _images),
    "resnet": (tf.ResNetForImageClassification, tf.ResNetConfig, _RESNET, _images),
    "mamba": (tf.MambaForCausalLM, tf.MambaConfig, _MAMBA, _text(_language)),
}


def build(name, dtype=torch.float64, seed=0):
    """A tiny model in training mode, and one batch for it."""
    model_class, config_class, settings, make_batch = MODELS[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).to(dtype)
    batch = make_batch(torch.Generator().manual_seed(seed))
    return model.train(), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def loss_fn(model, batch):
    return model(**batch).loss


class Halves(nn.Module):
    """Two symmetries of one kind and size with one writer; with a norm, both fold its gain."""

    def __init__(self, norm=None):
        super().__init__()
        self.w, self.norm = nn.Linear(5, 8, bias=False), norm or nn.Identity()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        u, v = self.norm(self.w(x)).chunk(2, -1)
        return self.a(u) + self.b(v)
