"""Architectures that read images together with text, and those that are in no other family."""

from .batches import (
    ACTIONS,
    IMAGE_TOKEN,
    LENGTH,
    STATES,
    VOCAB,
    byte_classification,
    captioning,
    image_prefix,
    image_prompt,
    image_with_text,
    language_modelling,
    table_classification,
    trajectories,
    visual_question,
)
from .kinds import EFFICIENT, IMAGE, LAYERS, LLAMA, TEXT, Architecture, custom, decoder, encoder, towers, vit

FAMILIES: dict[str, dict[str, Architecture]] = {
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
