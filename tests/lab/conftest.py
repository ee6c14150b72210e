"""Files of tiny experiments, see tests/tiny_experiments.py."""

import pytest
import yaml

from tiny_experiments import DEFAULTS, MODELS, SHORT, first_rows


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """A folder with the first rows of each data set, by its name."""
    rows = {"mnist": 200, "ptb": 60, "sst2": 60, "etth1": 400}
    return {name: first_rows(name, tmp_path_factory.mktemp(name), count) for name, count in rows.items()}


@pytest.fixture
def config(heads, tmp_path):
    """A function that writes a YAML file and returns its path: 6 steps with a teleport before the third."""

    def write(**settings):
        file = tmp_path / "tiny.yaml"
        own = {"folder": str(heads["mnist"]), "output_dir": str(tmp_path / "out"), **settings}
        file.write_text(yaml.safe_dump({**DEFAULTS, **own}, sort_keys=False))
        return file

    return write


@pytest.fixture
def short(config, heads):
    """A function that writes the YAML file of two steps of a model on its data."""

    def write(model, **settings):
        own = MODELS[model]
        return config(**{**SHORT, "model": model, **own, "folder": str(heads[own["dataset"]]), **settings})

    return write
