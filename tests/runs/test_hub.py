"""The real client pushes a teleported model to a Hub over HTTP, and plain Transformers loads it from there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from pages import rows_of

from hf_teleport.training.card import HEADING

from hub_double import running_hub

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub to which hub_training.py has pushed, the results and the folder of that, and a way to run Python against the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as double:
        double.broken |= {"somebody/broken_plain", "somebody/broken_teleport"}
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **double.environment(folder / "home")}

        def run(*command):
            return subprocess.run(
                [sys.executable, *map(str, command)], env=variables, capture_output=True, text=True, timeout=200
            )

        done = run(ROOT / "tests" / "hub_training.py", folder)
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads((folder / "results.json").read_text())
        yield SimpleNamespace(repos=double.repos, requests=double.requests, folder=folder, results=results, run=run)


def card_on(hub, name):
    return ModelCard(hub.repos[f"somebody/{name}"].files["README.md"].decode())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_hub_strategy_pushes_what_trainer_pushes(hub, strategy):
    repo = hub.repos[f"somebody/{strategy}"]
    assert repo.private == (strategy == "end")
    in_progress = [] if strategy == "end" else ["Training in progress, step 2", "Training in progress, step 4"]
    if "checkpoint" in strategy:
        in_progress = [title for first in in_progress for title in (first, f"{first}, checkpoint")]
    last = "Model save" if strategy == "every_save" else "End of training"
    assert [title for title, _ in repo.commits] == [*in_progress, last]
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert {path.split("/")[0] for path in repo.files if "/" in path} == folders.get(strategy, set())
    assert {"README.md", "config.json", "model.safetensors"} <= set(repo.commits[-1][1])


@pytest.mark.parametrize("name", [*STRATEGIES, "tied"])
def test_the_card_on_the_hub(hub, name):
    card = card_on(hub, name)
    assert {"hf_teleport", "teleportation", "generated_from_trainer"} <= set(card.data.tags)
    assert ("digits" in card.data.tags) == (name not in ("every_save", "tied"))
    assert card.text.count(HEADING) == 1
    (row,) = rows_of(card.text)[2:]
    assert row[:2] == ["1", "basis" if name == "tied" else "null_space"]
    assert float(row[-3].rstrip("%")) > 50
    assert row[-1] in ("steps_done", "max_growth")


def test_a_run_resumed_from_the_hub_tells_of_the_teleports_before(hub):
    rows = rows_of(card_on(hub, "resumed").text)[2:]
    assert [row[0] for row in rows] == ["1", "3"]
    assert hub.results["resumed"] == {"reports": 1}


@pytest.mark.parametrize("name", [*STRATEGIES, "tied"])
def test_safetensors_on_the_hub_are_the_trained_weights_bit_for_bit(hub, name):
    weights = torch.load(hub.folder / f"{name}.pt")["weights"]
    if name == "tied":
        assert hub.results["tied"]["turned"] > 0
        assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    stored = safetensors.torch.load(hub.repos[f"somebody/{name}"].files["model.safetensors"])

    def contents(tensors):
        # Without names, for Transformers saves a ViT under those of its older releases.
        return sorted((list(tensor.shape), tensor.numpy().tobytes()) for tensor in tensors.values())

    assert contents(stored) == contents(weights)


LOAD = """
import sys
sys.modules["hf_teleport"] = None  # so that importing it fails
import torch
import transformers

torch.set_num_threads(1)
for name, kind in zip(sys.argv[2::2], sys.argv[3::2]):
    model = getattr(transformers, kind).from_pretrained(f"somebody/{name}").eval()
    with torch.no_grad():
        output = model(**torch.load(f"{sys.argv[1]}/{name}.pt")["inputs"]).logits
    torch.save({"output": output, "weights": model.state_dict()}, f"{sys.argv[1]}/{name}-loaded.pt")
"""


@pytest.fixture(scope="module")
def loaded(hub):
    """What a process without hf_teleport has loaded from the Hub."""
    kinds = {**dict.fromkeys(STRATEGIES, "AutoModelForImageClassification"), "tied": "AutoModelForCausalLM"}
    done = hub.run("-c", LOAD, hub.folder, *(word for pair in kinds.items() for word in pair))
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: torch.load(hub.folder / f"{name}-loaded.pt")


@pytest.mark.parametrize("name", [*STRATEGIES, "tied"])
def test_plain_transformers_loads_it_without_this_package(hub, loaded, name):
    trained, plain = torch.load(hub.folder / f"{name}.pt"), loaded(name)
    assert set(plain["weights"]) == set(trained["weights"])
    assert all(torch.equal(plain["weights"][key], trained["weights"][key]) for key in plain["weights"])
    assert torch.equal(plain["output"], trained["output"])
    assert any(re.fullmatch(rf"GET /somebody/{name}/resolve/\w+/model.safetensors", request) for request in hub.requests)


def test_the_private_one_is_not_for_everybody(hub):
    code = "import sys, huggingface_hub as h; print(h.HfApi().model_info(sys.argv[1], token=sys.argv[2] == 'with').private)"
    asked = {
        (name, token): hub.run("-c", code, f"somebody/{name}", token) for name in ("end", "tied") for token in ("with", "no")
    }
    assert asked["end", "with"].stdout == "True\n"
    assert "RepositoryNotFoundError" in asked["end", "no"].stderr
    assert asked["tied", "no"].stdout == "False\n"


def test_a_hub_that_refuses_commits_costs_no_training_and_is_told_as_trainer_tells_it(hub):
    plain, teleport = hub.results["broken_plain"], hub.results["broken_teleport"]
    assert teleport == plain
    assert plain["steps"] == 4
    assert plain["error"].startswith("HfHubHTTPError: ")
    assert "500" in plain["error"]
    assert not hub.repos["somebody/broken_teleport"].commits
    assert HEADING in (hub.folder / "broken_teleport" / "README.md").read_text(encoding="utf-8")
