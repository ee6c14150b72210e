"""Tiny architectures of Transformers, with random weights, each with a batch of inputs that gives a scalar loss.

    from zoo_models import NAMES, build, loss_fn

    model, batch = build("llama", torch.float64)
    loss_fn(model, batch).backward()

An architecture is one line of the tables below: a class of Transformers, the sizes of its config that differ from those
of its kind (encoder, decoder, ...), and where needed its own batch. Whatever a line leaves out, the attention
implementation and dropout included, is the library's default.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Any]

BATCH = 2
LENGTH = 7
VOCAB = 60
IMAGE_TOKEN = VOCAB - 1
STATES = 6  # of the decision transformer's environment
ACTIONS = 2


# --- Batches -----------------------------------------------------------------------------------------------------------


def token_ids(length: int = LENGTH) -> Tensor:
    """Neither padding, bos, eos (0, 1, 2), nor the image token."""
    return torch.randint(3, IMAGE_TOKEN, (BATCH, length))


def classes() -> Tensor:
    return torch.arange(BATCH)


def text_classification() -> Batch:
    return {"input_ids": token_ids(), "labels": classes()}


def language_modelling() -> Batch:
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


def text_to_text() -> Batch:
    return {"input_ids": token_ids(), "labels": token_ids()}


def layout_classification() -> Batch:
    return text_classification() | {"bbox": torch.tensor([1, 2, 5, 9]).expand(BATCH, LENGTH, 4)}


def table_classification() -> Batch:
    return text_classification() | {"token_type_ids": torch.randint(0, 2, (BATCH, LENGTH, 7))}


def byte_classification() -> Batch:
    return {"inputs": token_ids(), "labels": classes()}


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def image_classification(size: int = 32) -> Batch:
    return {"pixel_values": images(size), "labels": classes()}


def video_classification() -> Batch:
    return {"pixel_values": torch.randn(BATCH, 2, 3, 32, 32), "labels": classes()}


def semantic_segmentation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "labels": torch.randint(0, 2, (BATCH, size, size))}


def depth_estimation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "labels": 1 + torch.rand(BATCH, size, size)}


def detection(size: int = 64) -> Batch:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2]])
    return {"pixel_values": images(size), "labels": [{"class_labels": classes(), "boxes": boxes} for _ in range(BATCH)]}


def instance_segmentation(size: int = 64) -> Batch:
    masks = torch.zeros(2, size, size)
    masks[0, : size // 2] = masks[1, size // 2 :] = 1
    return {"pixel_values": images(size), "mask_labels": [masks] * BATCH, "class_labels": [classes()] * BATCH}


def prompted_segmentation(size: int = 64) -> Batch:
    return {"pixel_values": images(size), "input_points": size * torch.rand(BATCH, 1, 1, 2)}


def speech_recognition(samples: int = 400) -> Batch:
    return {"input_values": torch.randn(BATCH, samples), "labels": token_ids(4)}


def spectrogram_to_text(*shape: int) -> Batch:
    return {"input_features": torch.randn(BATCH, *shape), "labels": token_ids()}


def spectrogram_classification() -> Batch:
    return {"input_values": torch.randn(BATCH, 24, 16), "labels": classes()}


def waveform() -> Batch:
    return {"input_values": torch.randn(BATCH, 1, 64)}


def forecast_with_lags() -> Batch:
    """A context of 8 and lags up to 3 before it, to predict 4."""
    return {
        "past_values": torch.randn(BATCH, 11),
        "past_time_features": torch.randn(BATCH, 11, 1),
        "past_observed_mask": torch.ones(BATCH, 11),
        "future_values": torch.randn(BATCH, 4),
        "future_time_features": torch.randn(BATCH, 4, 1),
    }


def forecast(*channels: int) -> Batch:
    return {"past_values": torch.randn(BATCH, 16, *channels), "future_values": torch.randn(BATCH, 4, *channels)}


def image_text_pairs() -> Batch:
    return {"input_ids": token_ids(), "pixel_values": images(), "return_loss": True}


def image_with_text() -> Batch:
    return {"input_ids": token_ids(), "pixel_values": images()}


def captioning() -> Batch:
    return language_modelling() | {"pixel_values": images()}


def visual_question() -> Batch:
    return image_with_text() | {"labels": torch.rand(BATCH, 2)}


def image_prompt() -> Batch:
    """A prompt that starts with the tokens which the 16 patches of the image replace."""
    ids = torch.cat([torch.full((BATCH, 16), IMAGE_TOKEN), token_ids()], dim=1)
    return {"input_ids": ids, "labels": ids, "pixel_values": images()}


def image_prefix() -> Batch:
    batch = image_prompt()
    return batch | {"token_type_ids": (batch["input_ids"] != IMAGE_TOKEN).long()}


def trajectories() -> Batch:
    return {
        "states": torch.randn(BATCH, LENGTH, STATES),
        "actions": torch.randn(BATCH, LENGTH, ACTIONS),
        "rewards": torch.randn(BATCH, LENGTH, 1),
        "returns_to_go": torch.randn(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, LENGTH),
    }


# --- Kinds of architectures --------------------------------------------------------------------------------------------


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


# --- The zoo -----------------------------------------------------------------------------------------------------------

ZOO = {
    "encoder": {
        "bert": encoder("BertForSequenceClassification"),
        "roberta": encoder("RobertaForSequenceClassification"),
        "distilbert": encoder("DistilBertForSequenceClassification", hidden_dim=48),
        "albert": encoder("AlbertForSequenceClassification", embedding_size=16),
        "electra": encoder("ElectraForSequenceClassification", embedding_size=16),
        "deberta": encoder("DebertaForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
        "deberta-v2": encoder("DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
        "mpnet": encoder("MPNetForSequenceClassification"),
        "convbert": encoder("ConvBertForSequenceClassification", embedding_size=16, conv_kernel_size=3),
        "funnel": custom(
            "FunnelForSequenceClassification",
            text_classification,
            vocab_size=VOCAB,
            block_sizes=[1, 1],
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
        ),
        "longformer": encoder("LongformerForSequenceClassification", attention_window=4),
        "big_bird": encoder("BigBirdForSequenceClassification", attention_type="original_full"),
        "squeezebert": encoder("SqueezeBertForSequenceClassification", embedding_size=32),
        "mobilebert": encoder("MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16),
        "xlnet": custom(
            "XLNetForSequenceClassification", text_classification, vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48
        ),
        "modernbert": encoder("ModernBertForSequenceClassification", local_attention=4),
        "nystromformer": encoder("NystromformerForSequenceClassification", segment_means_seq_len=LENGTH, num_landmarks=LENGTH),
        "roformer": encoder("RoFormerForSequenceClassification"),
        "fnet": encoder("FNetForSequenceClassification"),
        "xlm": encoder("XLMForSequenceClassification", emb_dim=32),
        "layoutlm": encoder("LayoutLMForSequenceClassification", layout_classification, max_2d_position_embeddings=16),
    },
    "decoder": {
        "gpt2": decoder("GPT2LMHeadModel"),
        "gpt_neo": decoder("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
        "gpt_neox": decoder("GPTNeoXForCausalLM"),
        "gptj": decoder("GPTJForCausalLM", rotary_dim=4),
        "gpt_bigcode": decoder("GPTBigCodeForCausalLM"),
        "openai-gpt": decoder("OpenAIGPTLMHeadModel"),
        "opt": decoder("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16),
        "bloom": decoder("BloomForCausalLM"),
        "mpt": decoder("MptForCausalLM"),
        "codegen": decoder("CodeGenForCausalLM", rotary_dim=4),
        "ctrl": decoder("CTRLLMHeadModel", dff=48),
        "biogpt": decoder("BioGptForCausalLM"),
        "llama": llama("LlamaForCausalLM"),
        "mistral": llama("MistralForCausalLM", sliding_window=4),
        "qwen2": llama("Qwen2ForCausalLM"),
        "qwen3": llama("Qwen3ForCausalLM"),
        "gemma": llama("GemmaForCausalLM"),
        "gemma2": llama("Gemma2ForCausalLM", sliding_window=4),
        "gemma3_text": llama("Gemma3ForCausalLM", sliding_window=4),
        "phi": llama("PhiForCausalLM"),
        "phi3": llama("Phi3ForCausalLM"),
        "falcon": decoder("FalconForCausalLM"),
        "stablelm": llama("StableLmForCausalLM"),
        "starcoder2": llama("Starcoder2ForCausalLM"),
        "olmo": llama("OlmoForCausalLM"),
        "olmo2": llama("Olmo2ForCausalLM"),
        "cohere": llama("CohereForCausalLM"),
        "granite": llama("GraniteForCausalLM"),
        "glm": llama("GlmForCausalLM"),
        "nemotron": llama("NemotronForCausalLM"),
    },
    "encoder-decoder": {
        "t5": t5("T5ForConditionalGeneration"),
        "mt5": t5("MT5ForConditionalGeneration"),
        "umt5": t5("UMT5ForConditionalGeneration"),
        "longt5": t5("LongT5ForConditionalGeneration", local_radius=2),
        "bart": bart("BartForConditionalGeneration"),
        "mbart": bart("MBartForConditionalGeneration"),
        "pegasus": bart("PegasusForConditionalGeneration"),
        "marian": bart("MarianMTModel"),
        "m2m_100": bart("M2M100ForConditionalGeneration"),
        "blenderbot": bart("BlenderbotForConditionalGeneration"),
        "fsmt": bart("FSMTForConditionalGeneration", src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
        "led": bart("LEDForConditionalGeneration", attention_window=4, max_encoder_position_embeddings=64),
        "prophetnet": custom(
            "ProphetNetForConditionalGeneration",
            text_to_text,
            vocab_size=VOCAB,
            hidden_size=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
        ),
    },
    "mixture of experts": {
        "mixtral": experts("MixtralForCausalLM"),
        "qwen2_moe": experts("Qwen2MoeForCausalLM", shared_expert_intermediate_size=16),
        "qwen3_moe": experts("Qwen3MoeForCausalLM"),
        "olmoe": experts("OlmoeForCausalLM"),
        "granitemoe": experts("GraniteMoeForCausalLM"),
        "phimoe": experts("PhimoeForCausalLM"),
        "gpt_oss": experts("GptOssForCausalLM"),
        "jetmoe": experts("JetMoeForCausalLM", kv_channels=8),
        "deepseek_v2": experts("DeepseekV2ForCausalLM", **DEEPSEEK),
        "deepseek_v3": experts("DeepseekV3ForCausalLM", **DEEPSEEK, n_group=2, topk_group=1),
        "dbrx": experts(
            "DbrxForCausalLM",
            d_model=32,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "switch_transformers": t5(
            "SwitchTransformersForConditionalGeneration",
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
            expert_capacity=8,
        ),
    },
    "recurrent and hybrid": {
        "mamba": decoder("MambaForCausalLM", state_size=8),
        "mamba2": decoder("Mamba2ForCausalLM", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
        "falcon_mamba": decoder("FalconMambaForCausalLM", state_size=8),
        "rwkv": decoder("RwkvForCausalLM", use_cache=False),  # it writes its cache in place, which breaks the backward pass
        "recurrent_gemma": llama("RecurrentGemmaForCausalLM", num_hidden_layers=3, attention_window_size=4),
        "jamba": experts("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
        "bamba": llama("BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=4),
        # two hybrid layers at least, as they share their weights
        "zamba": llama("ZambaForCausalLM", num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8),
        "zamba2": llama("Zamba2ForCausalLM", layers_block_type=["mamba", "hybrid"], mamba_d_state=8, chunk_size=4),
        "nemotron_h": experts(
            "NemotronHForCausalLM",
            layers_block_type=["mamba", "attention", "moe", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=2,
            chunk_size=4,
            moe_shared_expert_intermediate_size=16,
        ),
        "granitemoehybrid": experts(
            "GraniteMoeHybridForCausalLM",
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_state=8,
            mamba_chunk_size=4,
            shared_intermediate_size=16,
        ),
        "qwen3_next": experts(
            "Qwen3NextForCausalLM",
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            shared_expert_intermediate_size=16,
        ),
        "lfm2": llama("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_multiple_of=16),
    },
    "vision transformer": {
        "vit": vit("ViTForImageClassification"),
        "deit": vit("DeiTForImageClassification"),
        "beit": vit("BeitForImageClassification", use_relative_position_bias=True),
        "dinov2": vit("Dinov2ForImageClassification", mlp_ratio=2),
        "data2vec-vision": vit("Data2VecVisionForImageClassification"),
        "ijepa": vit("IJepaForImageClassification"),
        "swin": staged("SwinForImageClassification", **WINDOWS),
        "swinv2": staged("Swinv2ForImageClassification", **WINDOWS),
        "hiera": vit(
            "HieraForImageClassification",
            embed_dim=16,
            image_size=[32, 32],
            patch_size=[7, 7],
            depths=[1, 1],
            num_heads=[1, 2],
            num_query_pool=1,
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
        ),
        "pvt": staged("PvtForImageClassification", **PYRAMID, strides=[4, 2, 2, 1]),
        "pvt_v2": staged("PvtV2ForImageClassification", **PYRAMID),
        "segformer": staged("SegformerForImageClassification", **PYRAMID),
        "poolformer": staged("PoolFormerForImageClassification", **PYRAMID),
        "mobilevit": staged(
            "MobileViTForImageClassification",
            partial(image_classification, 128),
            image_size=128,
            patch_size=2,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8] * 7,
            initializer_range=0.2,  # at 0.1 the signal dies out in so narrow a network, and batch norm blows up the rest
        ),
        "swiftformer": staged("SwiftFormerForImageClassification", depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
        "levit": staged(
            "LevitForImageClassification",
            partial(image_classification, 128),
            image_size=128,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 4],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
        ),
        "cvt": staged("CvtForImageClassification", embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3]),
        "imagegpt": decoder("ImageGPTForImageClassification", text_classification),
        "timesformer": vit("TimesformerForVideoClassification", video_classification, num_frames=2),
        "videomae": vit("VideoMAEForVideoClassification", video_classification, num_frames=2),
        "vivit": vit("VivitForVideoClassification", video_classification, num_frames=2, tubelet_size=[2, 8, 8]),
    },
    "convolutional": {
        "resnet": staged("ResNetForImageClassification", **RESNET),
        "regnet": staged("RegNetForImageClassification", embedding_size=8, groups_width=8, **STAGES),
        "convnext": staged("ConvNextForImageClassification", **STAGES),
        "convnextv2": staged("ConvNextV2ForImageClassification", **STAGES),
        # the default dropout, 0.999, leaves nothing to learn from
        "mobilenet_v1": staged(
            "MobileNetV1ForImageClassification", initializer_range=0.3, depth_multiplier=0.25, classifier_dropout_prob=0.1
        ),
        "mobilenet_v2": staged("MobileNetV2ForImageClassification", initializer_range=0.3, depth_multiplier=0.25),
        "efficientnet": staged("EfficientNetForImageClassification", **EFFICIENT),
        "bit": staged("BitForImageClassification", embedding_size=8, num_groups=4, **STAGES),
        "focalnet": staged(
            "FocalNetForImageClassification", embed_dim=16, depths=[1, 1], hidden_sizes=[16, 32], focal_levels=[2, 2]
        ),
        "hgnet_v2": staged(
            "HGNetV2ForImageClassification",
            stem_channels=[3, 8, 8],
            hidden_sizes=[8, 16, 16, 32],
            stage_in_channels=[8, 8, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 16, 32],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[2, 2, 2, 2],
        ),
    },
    "detection and segmentation": {
        "detr": detector("DetrForObjectDetection", backbone_config=RESNET, num_queries=4, **BART),
        "conditional_detr": detector("ConditionalDetrForObjectDetection", backbone_config=RESNET, num_queries=4, **BART),
        "deformable_detr": detector(
            "DeformableDetrForObjectDetection",
            backbone_config=RESNET | {"out_features": ["stage3", "stage4"]},
            num_queries=4,
            num_feature_levels=2,
            **BART,
        ),
        "rt_detr": detector(
            "RTDetrForObjectDetection",
            backbone_config=RESNET | {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4]},
            num_queries=4,
            num_denoising=4,
            encoder_hidden_dim=32,
            encoder_in_channels=[16, 16, 32],
            decoder_in_channels=[32, 32, 32],
            **BART,
        ),
        "yolos": detector(
            "YolosForObjectDetection", **IMAGE | {"image_size": [64, 64], "patch_size": 16}, num_detection_tokens=4
        ),
        "maskformer": custom(
            "MaskFormerForInstanceSegmentation",
            instance_segmentation,
            backbone_config=SWIN,
            decoder_config={"model_type": "detr", "num_queries": 4, **BART},
            fpn_feature_size=32,
            mask_feature_size=32,
        ),
        "mask2former": custom(
            "Mask2FormerForUniversalSegmentation",
            instance_segmentation,
            backbone_config=SWIN,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=48,
            encoder_layers=2,
            decoder_layers=2,
            num_attention_heads=4,
            dim_feedforward=48,
            num_queries=4,
            train_num_points=32,
        ),
        "segformer-semantic": custom(
            "SegformerForSemanticSegmentation", semantic_segmentation, decoder_hidden_size=16, **PYRAMID
        ),
        "upernet": custom(
            "UperNetForSemanticSegmentation",
            semantic_segmentation,
            backbone_config=CONVNEXT,
            hidden_size=16,
            auxiliary_channels=16,
            auxiliary_in_channels=16,
        ),
        "dpt": vit(
            "DPTForSemanticSegmentation",
            partial(semantic_segmentation, 32),
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
        ),
        "glpn": custom("GLPNForDepthEstimation", depth_estimation, decoder_hidden_size=16, **PYRAMID),
        "sam": custom(
            "SamModel",
            prompted_segmentation,
            vision_config=IMAGE | {"image_size": 64, "output_channels": 32, "num_pos_feats": 16, "window_size": 4},
            prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
        ),
    },
    "audio": {
        "wav2vec2": speech("Wav2Vec2ForCTC"),
        "hubert": speech("HubertForCTC"),
        "wavlm": speech("WavLMForCTC"),
        "unispeech": speech("UniSpeechForCTC"),
        "data2vec-audio": speech("Data2VecAudioForCTC", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
        "sew": speech("SEWForCTC"),
        "whisper": bart(
            "WhisperForConditionalGeneration",
            partial(spectrogram_to_text, 8, 20),
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
        ),
        "speech_to_text": bart(
            "Speech2TextForConditionalGeneration",
            partial(spectrogram_to_text, 20, 8),
            input_feat_per_channel=8,
            conv_channels=16,
            max_source_positions=64,
            max_target_positions=16,
        ),
        "moonshine": bart(
            "MoonshineForConditionalGeneration",
            partial(speech_recognition, 2000),
            **LAYERS,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
        ),
        "audio-spectrogram-transformer": vit(
            "ASTForAudioClassification", spectrogram_classification, max_length=24, num_mel_bins=16
        ),
        "encodec": custom(
            "EncodecModel",
            waveform,
            num_filters=4,
            hidden_size=16,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            sampling_rate=800,
            target_bandwidths=[1.5],
        ),
    },
    "time series": {
        "time_series_transformer": series("TimeSeriesTransformerForPrediction"),
        "autoformer": series("AutoformerForPrediction", label_length=4, moving_average=3),
        "informer": series("InformerForPrediction"),
        "patchtst": patches("PatchTSTForPrediction", num_hidden_layers=2, ffn_dim=48),
        "patchtsmixer": patches("PatchTSMixerForPrediction", num_layers=2),
        "timesfm": custom(
            "TimesFmModelForPrediction", forecast, **LAYERS, head_dim=8, patch_length=4, context_length=16, horizon_length=4
        ),
    },
    "multi-modal": {
        "clip": towers("CLIPModel"),
        "siglip": towers("SiglipModel"),
        "altclip": towers("AltCLIPModel"),
        "chinese_clip": towers("ChineseCLIPModel"),
        "blip": towers("BlipForConditionalGeneration", captioning),
        "flava": towers("FlavaModel", image_with_text, image_config=IMAGE, multimodal_config=LAYERS, hidden_size=32),
        "align": towers("AlignModel", text_config=TEXT, vision_config=EFFICIENT, projection_dim=24),
        "vilt": vit("ViltForQuestionAnswering", visual_question, vocab_size=VOCAB),
        "git": encoder("GitForCausalLM", captioning, vision_config=IMAGE),
        "llava": custom(
            "LlavaForConditionalGeneration",
            image_prompt,
            text_config=LLAMA | {"model_type": "llama"},
            vision_config=IMAGE | {"model_type": "clip_vision_model"},
            image_token_index=IMAGE_TOKEN,
        ),
        "paligemma": custom(
            "PaliGemmaForConditionalGeneration",
            image_prefix,
            text_config=LLAMA | {"model_type": "gemma"},
            vision_config=IMAGE | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        ),
    },
    "other": {
        "decision_transformer": decoder(
            "DecisionTransformerModel", trajectories, state_dim=STATES, act_dim=ACTIONS, max_ep_len=LENGTH
        ),
        "perceiver": encoder(
            "PerceiverForSequenceClassification",
            byte_classification,
            num_latents=8,
            d_latents=32,
            d_model=32,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        "esm": encoder("EsmForMaskedLM", language_modelling, mask_token_id=2),
        "tapas": encoder("TapasForSequenceClassification", table_classification, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 8]),
    },
}

FAMILIES = {family: list(members) for family, members in ZOO.items()}
NAMES = [name for members in FAMILIES.values() for name in members]


# --- What a script needs -----------------------------------------------------------------------------------------------


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A model, as it comes out of its constructor, and its batch; both are functions of the seed, which this sets."""
    architectures = {name: architecture for members in ZOO.values() for name, architecture in members.items()}
    if name not in architectures:
        raise KeyError(f"no architecture is called {name!r}, but these are: {', '.join(NAMES)}")
    head, batch, sizes = architectures[name]
    model_class = getattr(transformers, head)
    transformers.set_seed(seed)
    model = model_class(model_class.config_class(**deepcopy(sizes))).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one, torch's grouped_mm, knows no float64
    return model, cast(batch(), dtype)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, or else how far its outputs are from a fixed pattern."""
    outputs = model(**batch)
    if outputs.get("loss") is not None:
        return outputs["loss"].mean()
    # not from zero: what a normalization gives has the same mean square whatever the weights are
    return torch.stack([(x - torch.arange(x.numel()).to(x).cos().view_as(x)).square().mean() for x in floats(outputs)]).sum()


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The same nest of dicts and lists, with its floating tensors in a dtype."""
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, list):
        return [cast(value, dtype) for value in batch]
    return batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def floats(outputs: Any) -> Iterator[Tensor]:
    """The floating tensors in a nest of mappings, tuples and lists."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from floats(value)
