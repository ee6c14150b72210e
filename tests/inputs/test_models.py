import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport.inputs.models import load_model


def test_sizes_are_for_config_names_only(tmp_path):
    with pytest.raises(ValueError, match="--set gives the sizes of a config name"):
        load_model(str(tmp_path), {"hidden_size": 3})


def test_a_broken_file_of_weights_is_named(tmp_path):
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="2KB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"could not be loaded: {file.name} \(.*\) is cut short or broken: .*\. To fix it"):
        load_model(str(tmp_path))
