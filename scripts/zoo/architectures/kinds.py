"""What architectures of a kind have in common: the sizes of their configs, and a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .batches import (
    VOCAB,
    Batch,
    detection,
    forecast,
    forecast_with_lags,
    image_classification,
    image_text_pairs,
    language_modelling,
    speech_recognition,
    text_classification,
    text_to_text,
)


class Architecture(NamedTuple):
    head: str  # a class of transformers
    batch: Callable[[], Batch]
    sizes: dict[str, Any]  # of its config


def custom(head: str, batch: Callable[[], Batch], **sizes: Any) -> Architecture:
    """An architecture of no kind."""
    return Architecture(head, batch, sizes)


def kind(batch: Callable[[], Batch], **common: Any) -> Callable[..., Architecture]:
    """What makes architectures of a kind: each out of its class, and of what it does not have in common with the kind."""

    def architecture(head: str, batch: Callable[[], Batch] = batch, **own: Any) -> Architecture:
        return Architecture(head, batch, common | own)

    return architecture


# Weights as large for 32 units as the usual 0.02 is for 768: with smaller ones, the inputs hardly matter to the outputs.
INIT = {"initializer_range": 0.1, "init_std": 0.1, "layer_scale_init_value": 0.1}
LAYERS = INIT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}

TEXT = LAYERS | TOKENS
LLAMA = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = LLAMA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}
BART = {
    **INIT,
    **TOKENS,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

IMAGE = LAYERS | {"image_size": 32, "patch_size": 8}
STAGES = INIT | {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2], "num_labels": 2}
WINDOWS = INIT | {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2, "image_size": 64}
EFFICIENT = {
    **INIT,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 4],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}
EVERY_STAGE = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
RESNET = STAGES | {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic"}
CONVNEXT = STAGES | EVERY_STAGE | {"model_type": "convnext"}
SWIN = WINDOWS | EVERY_STAGE | {"model_type": "swin"}

SPEECH = {
    **LAYERS,
    "vocab_size": VOCAB,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,  # its spans are longer than the audio
}
SERIES = INIT | {"d_model": 32, "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}
PATCHES = INIT | {"d_model": 32, "context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
TOWERS = {"text_config": TEXT | {"projection_dim": 16}, "vision_config": IMAGE | {"projection_dim": 16}, "projection_dim": 16}

encoder = kind(text_classification, **TEXT)
decoder = kind(language_modelling, **TEXT)
llama = kind(language_modelling, **LLAMA)
experts = kind(language_modelling, **EXPERTS)
bart = kind(text_to_text, **BART)
t5 = kind(text_to_text, **T5)
vit = kind(image_classification, **IMAGE)
staged = kind(partial(image_classification, 64), image_size=64, **INIT)
detector = kind(detection)
speech = kind(speech_recognition, **SPEECH)
series = kind(forecast_with_lags, **SERIES)
patches = kind(partial(forecast, 2), num_input_channels=2, **PATCHES)
towers = kind(image_text_pairs, **TOWERS)
