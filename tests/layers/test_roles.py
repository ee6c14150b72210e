import pytest
import transformers as tf
from torch import nn

from hf_teleport.layers.roles import end_layer, plain_name, role_of

from tiny_runs import llama


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("model.layers.0.self_attn.k_proj", "k"),
        ("model.layers.0.self_attn.v_proj", "v"),
        ("model.layers.0.self_attn.o_proj", "o"),
        ("model.layers.0.self_attn.out_proj", "o"),
        ("model.layers.0.self_attn.qkv_proj", "qkv"),
        ("model.layers.0.mlp.gate_up_proj", "mlp"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("bert.encoder.layer.0.attention.self.query", "q"),
        ("bert.encoder.layer.0.attention.output.dense", "o"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("bert.encoder.layer.0.output.dense", "mlp"),
        ("bert.pooler.dense", "linear"),
        ("encoder.block.0.layer.0.SelfAttention.o", "o"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "k"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "mlp"),
        ("gpt_neox.layers.0.attention.query_key_value", "qkv"),
        ("gpt_neox.layers.0.attention.dense", "o"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "mlp"),
        ("distilbert.transformer.layer.0.attention.q_lin", "q"),
        ("distilbert.transformer.layer.0.attention.out_lin", "o"),
        ("distilbert.transformer.layer.0.ffn.lin1", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("layers.0.self_attn.in_proj_weight", "qkv"),
        ("backbone.layers.0.mixer.in_proj", "linear"),
        ("rwkv.blocks.0.feed_forward.key", "mlp"),
        ("unet.attentions.0.to_out.0", "o"),
        ("classifier.1", "head"),
        ("score", "head"),
        ("0", "linear"),
    ],
)
def test_names_of_transformers_models(name, role):
    assert role_of(name, "linear") == role


def test_convolutions_stay_convolutions_except_in_attention_and_heads():
    assert role_of("resnet.encoder.stages.0.layers.0.layer.0.convolution", "conv") == "conv"
    assert role_of("encoder.block.0.mlp.dwconv", "conv") == "conv"
    assert role_of("encoder.attention.q_proj", "conv") == "q"
    assert role_of("classifier", "conv") == "head"


def test_what_the_model_calls_its_head_is_one():
    assert role_of("some.strange.name", "linear", is_head=True) == "head"


def test_a_plain_name_has_no_wrappers():
    assert plain_name("_orig_mod.model.layers.0._checkpoint_wrapped_module._orig_mod.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert plain_name("") == ""


def test_the_layers_at_a_models_ends():
    model = llama()
    assert end_layer(model, "input") is model.model.embed_tokens
    assert end_layer(model, "output") is model.lm_head
    assert end_layer(nn.Linear(2, 2), "input") is None
    resnet = tf.ResNetModel(tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    with pytest.raises(NotImplementedError):
        resnet.get_input_embeddings()
    assert end_layer(resnet, "input") is None
