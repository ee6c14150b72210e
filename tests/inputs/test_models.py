import pytest

from hf_teleport.inputs.models import load_model


def test_sizes_are_for_config_names_only(tmp_path):
    with pytest.raises(ValueError, match="--set gives the sizes of a config name"):
        load_model(str(tmp_path), {"hidden_size": 3})
