import pytest
import torch
import transformers as tf
from torch import nn

from hf_teleport.inputs.synthetic import synthetic_batch, synthetic_loss

import architectures
from tiny_models import MODELS, build


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_from_random_inputs(name):
    model, _ = build(name, dtype=torch.float32)
    batch = synthetic_batch(model, batch_size=2, length=6)
    loss = synthetic_loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    again = synthetic_batch(model, batch_size=2, length=6)
    assert all(torch.equal(batch[key], again[key]) for key in batch)


@pytest.mark.parametrize("name", ["bart", "swin", "detr", "upernet", "videomae", "speech_to_text", "wav2vec2", "clip", "blip"])
def test_kinds_of_the_zoo(name):
    model, _ = architectures.build(name)
    loss = synthetic_loss(model, synthetic_batch(model, batch_size=2, length=6))
    assert loss.requires_grad
    assert torch.isfinite(loss)


def test_a_model_without_a_loss_and_one_for_audio():
    model = tf.BertModel(
        tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    )
    assert synthetic_loss(model, synthetic_batch(model)).requires_grad
    audio = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=40,
            max_source_positions=20,
            num_mel_bins=8,
            pad_token_id=0,
            decoder_start_token_id=1,
        )
    )
    assert synthetic_batch(audio)["input_features"].shape == (2, 8, 40)
    assert torch.isfinite(synthetic_loss(audio, synthetic_batch(audio)))


def test_an_unknown_kind_of_input_is_said():
    model = nn.Linear(2, 2)
    model.config = tf.BertConfig()
    model.main_input_name = "past_values"
    with pytest.raises(ValueError, match=r"takes 'past_values'.*--data"):
        synthetic_batch(model)
