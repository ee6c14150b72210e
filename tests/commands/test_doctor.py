"""What `hf-teleport doctor` says, with versions that are written into a folder before all others on the path."""

import json
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from hf_teleport.cli import main
from hf_teleport.commands import doctor

from hub_double import running_hub
from tiny_models import build, loss_fn

SIZES = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4", "vocab_size=50"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a library look as if it were installed in some version."""
    monkeypatch.syspath_prepend(tmp_path)

    def as_if(name, version, *fields):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *fields]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return as_if


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_ranges_are_those_of_the_package(install):
    install(
        *("hf_teleport", "9.9", "Requires-Python: >=3.11", "Provides-Extra: plots", "Provides-Extra: dev"),
        *("Requires-Dist: there>=2.6", "Requires-Dist: old<3,>=2", "Requires-Dist: early>=2", "Requires-Dist: no-such-library"),
        *('Requires-Dist: pictures>=1; extra == "plots"', 'Requires-Dist: no-such-extra; extra == "plots"'),
        *('Requires-Dist: linter; extra == "dev"', 'Requires-Dist: elsewhere; sys_platform == "nowhere"'),
    )
    for name, version in (("there", "2.13.0+cpu"), ("old", "1.9"), ("early", "3.0.dev1"), ("pictures", "0.1")):
        install(name, version)
    found = by_subject(doctor.libraries())
    assert found["hf_teleport"].found == "9.9"
    assert found["python"].ok
    assert found["there"] == doctor.Finding("there", "2.13.0+cpu", ">=2.6", ok=True, required=True)
    assert found["early"].ok
    assert not found["old"].ok
    assert found["old"].advice == "pip install 'old<3,>=2'"
    assert found["no-such-library"].advice == "not installed; pip install 'no-such-library'"
    assert not found["pictures"].ok
    assert not found["pictures"].required
    assert not found["no-such-extra"].required
    assert not {"linter", "elsewhere"} & set(found)
    assert not doctor.healthy(found.values())
    assert doctor.healthy(finding for finding in found.values() if finding.subject in ("there", "pictures", "no-such-extra"))


def test_a_version_out_of_range_is_said_with_exit_code_1(install, capsys):
    install("transformers", "4.50.0")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BAD transformers" in out
    assert "pip install 'transformers>=5.3'" in out
    assert out.rstrip().endswith("Missing or unsupported: transformers.")
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["executable"] == sys.executable
    assert next(f for f in told["findings"] if f["subject"] == "transformers")["found"] == "4.50.0"


def test_a_python_that_is_too_old(install):
    install("hf_teleport", "9.9", "Requires-Python: >=99")
    python = by_subject(doctor.libraries())["python"]
    assert not python.ok
    assert "virtual environment" in python.advice


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGE", "no_such_package")
    (found,) = doctor.libraries()
    assert found.required
    assert not found.ok
    assert "pip install --editable" in found.advice


def test_this_environment_is_healthy(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("torch", "accelerate", "CPU", "GiB free", "gloo", "offline mode", "Everything required is installed."):
        assert words in out


def test_accelerators_and_their_backend(monkeypatch):
    about = type("About", (), {"name": "H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    found = by_subject(doctor.devices())
    assert found["cuda:1"].found == "H100, 80 GiB"
    assert "accelerator" not in found
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (backends,) = doctor.backends()
    assert not backends.ok
    assert "nccl" in backends.advice
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert not doctor.backends()[0].ok


def test_the_hub_is_asked_unless_offline(monkeypatch):
    assert "offline mode" in doctor.hub().found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    with running_hub() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.endpoint)
        assert doctor.hub().found == f"{double.endpoint} answers"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = doctor.hub(timeout=1)
    assert not found.ok
    assert not found.required
    assert "HF_HUB_OFFLINE=1" in found.advice


@pytest.mark.parametrize(("name", "method"), [("llama", "basis"), ("resnet", "null_space")])
def test_what_would_become_of_a_model(name, method):
    model, batch = build(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prognosis = doctor.foretell(model, batch, loss_fn)
    assert prognosis.method == method
    assert bool(prognosis.why) == (method != "basis")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    norms = next(line for line in prognosis.roles if line.startswith("norm"))
    assert "not: elementwise" in norms
    assert ":" not in norms.partition("not:")[2]


def test_a_model_by_name_on_rows_of_data(tmp_path, capsys):
    assert main(["doctor", "--model", "bert", "--set", *SIZES]) == 0
    out = capsys.readouterr().out
    assert "Method 'auto' with AdamW: basis." in out
    assert "\nMethod 'null_space':\n" in out
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}\n' * 2)
    words = ["doctor", "--model", "bert", "--set", *SIZES, "--data", str(tmp_path / "rows.jsonl"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert any(line.startswith("mlp") for line in told["model"]["roles"])
    assert main(["doctor", "--model", "no/such/model"]) == 2
