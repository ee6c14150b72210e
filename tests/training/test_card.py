"""Model cards and the Hub: what is said of the teleports, and that the real client pushes and loads a teleported model."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_teleport import TeleportConfig, TeleportMixin, TeleportTrainer
from hf_teleport.journal import teleports
from hf_teleport.report import TeleportReport
from hf_teleport.training.card import HEADING, add_to_card, section

from hub_double import running_hub
from hub_training import images, vit

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]

METADATA = """---
library_name: transformers
license: mit
base_model: somebody/base
tags:
- generated_from_trainer
datasets:
- imdb
metrics:
- accuracy
model-index:
- name: a name
  results:
  - task:
      type: text-classification
      name: Text Classification
    dataset:
      name: imdb
      type: imdb
      config: default
      split: test
      args: plain
    metrics:
    - type: accuracy
      value: 0.5
      name: Accuracy
---
"""


def event(step=8, **changed):
    report = replace(TeleportReport("null_space", 2.0, 2.0, 1.0, 3.0, 5, "max_growth", False, 0.25), **changed)
    return {"step": step, "epoch": 1.0, **report.metrics()}


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def arguments(folder, **settings):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    return TrainingArguments(str(folder), **{**defaults, **settings}, disable_tqdm=True, use_cpu=True)


def trained(folder, model=None, rows=None, steps=(0,), **config):
    config = {"method": "null_space", **config}
    settings = TeleportConfig(steps=list(steps), num_batches=1, batch_size=2, **config)
    trainer = TeleportTrainer(model or vit(), arguments(folder), train_dataset=rows or images(), teleport_config=settings)
    trainer.train()
    return trainer


def readme(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


# The section.


@pytest.mark.parametrize(
    "config",
    [
        TeleportConfig(),
        TeleportConfig(epochs=[0, 2], max_growth=None, learning_rate=1e-3, target_modules=r"model\.layers\.[0-3]\..*'"),
        TeleportConfig(method="basis", steps=[10], every_steps=100, symmetries=["stream", "chain"], exclude_modules=["lm_head"]),
    ],
)
def test_the_settings_are_python_that_gives_them_back(config):
    text = section(config, [event()])
    code = text.split("```python\n")[1].split("```")[0].splitlines()
    scope = {}
    exec("\n".join(code[:-1]), scope)
    assert scope["config"] == config
    assert code[-1] == "trainer = TeleportTrainer(model, arguments, train_dataset=rows, teleport_config=config)"


def test_settings_that_are_the_default_are_left_out():
    assert TeleportConfig().as_python() == "TeleportConfig()"
    assert TeleportConfig(num_batches=3).as_python() == "TeleportConfig(num_batches=3)"


def test_a_row_for_each_event():
    text = section(TeleportConfig(), [event(0), event(8, method="basis", rolled_back=True)])
    header, line, first, second = rows_of(text)
    assert len(header) == len(line)
    assert first == ["0", "null_space", "2 -> 2", "1 -> 3", "5", "0%", "0.25 s", "max_growth"]
    assert (second[1], second[-1]) == ("basis", "max_growth, undone")
    assert "`null_space`: Ascent" in text
    assert "`basis`: One change" in text


def test_only_the_methods_that_were_used_are_explained():
    assert "`basis`:" not in section(TeleportConfig(), [event()])
    assert "`null_space`:" not in section(TeleportConfig(), [event(method="basis")])


def test_numbers_that_are_missing_or_not_finite():
    broken = event(loss_before=math.nan, loss_after=math.inf, grad_norm_before=None)
    header, _, first, second = rows_of(section(TeleportConfig(), [broken, {"loss_before": 1.0}]))
    assert first[2:4] == ["not finite -> not finite", "not finite -> 3"]
    assert second == ["", "", "1 ->", "", "", "", "", ""]
    assert len(header) == len(first) == len(second)


# Into a card.


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_the_card_stays_and_a_second_time_changes_nothing(tmp_path, newline):
    card = tmp_path / "README.md"
    text = f"{METADATA}\n# Model\n\ntext\n\n## More\n\ntext\n".replace("\n", newline)
    card.write_text(text, encoding="utf-8", newline="")
    before = ModelCard.load(card)
    add_to_card(card, TeleportConfig(), [event(0)])
    once = card.read_text(encoding="utf-8")
    after = ModelCard(once)
    assert after.data.tags == ["generated_from_trainer", "hf_teleport", "teleportation"]
    after.data.tags = before.data.tags
    assert after.data.to_dict() == before.data.to_dict()
    assert "\n\n# Model\n\ntext\n\n## More\n\ntext\n\n## Teleportation\n\n" in once
    add_to_card(card, TeleportConfig(), [event(0)])
    assert card.read_text(encoding="utf-8") == once


def test_an_older_section_is_replaced_wherever_it_stands(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"{METADATA}\n# Model\n\n{section(TeleportConfig(), [event(3)])}\n\n## Mine\n\nkept\n", encoding="utf-8")
    add_to_card(card, TeleportConfig(), [event(4)])
    text = readme(tmp_path)
    assert text.count(HEADING) == text.count("@article") == 1
    assert [row[0] for row in rows_of(text)[2:]] == ["4"]
    assert "# Model\n\n## Mine\n\nkept\n\n## Teleportation\n" in text


def test_without_a_teleport_the_card_is_trainers(tmp_path):
    plain = Trainer(vit(), arguments(tmp_path / "plain"), train_dataset=images())
    off = TeleportTrainer(vit(), arguments(tmp_path / "off"), train_dataset=images(), teleport_config=TeleportConfig(epochs=0))
    not_yet = TeleportTrainer(vit(), arguments(tmp_path / "not_yet"), train_dataset=images())
    for trainer in (plain, off):
        trainer.train()
        trainer.create_model_card(model_name="m", tags=["a"])
    assert readme(tmp_path / "off") == readme(tmp_path / "plain")
    not_yet.create_model_card()
    assert HEADING not in readme(tmp_path / "not_yet")


@pytest.mark.parametrize("tags", ["mine", ["mine", "teleportation"], None])
def test_tags_and_all_that_trainers_card_takes(tmp_path, tags):
    trainer = trained(tmp_path)
    trainer.create_model_card("en", "mit", tags, "a name", dataset="digits")
    first = readme(tmp_path)
    data = ModelCard(first).data
    assert (data.language, data.license) == (["en"], "mit")
    assert set(data.tags) == {"generated_from_trainer", "hf_teleport", "teleportation"} | ({"mine"} if tags else set())
    assert len(data.tags) == len(set(data.tags))
    assert "# a name" in first
    # Trainer writes the whole card anew, and finds its own tags in the old one.
    trainer.create_model_card("en", "mit", tags, "a name", dataset="digits")
    assert readme(tmp_path).split("---\n")[2] == first.split("---\n")[2]
    assert set(ModelCard(readme(tmp_path)).data.tags) == set(data.tags)


def test_each_method_of_a_combined_event_has_a_row(tmp_path):
    trainer = trained(tmp_path, method="null_space+basis")
    trainer.create_model_card()
    assert [(row[0], row[1]) for row in rows_of(readme(tmp_path))[2:]] == [("0", "null_space"), ("0", "basis")]
    logged = teleports(trainer.state.log_history)
    assert [entry["loss_after"] for entry in logged] == [report.loss_after for report in trainer.teleport_reports]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    trainer = trained(tmp_path)
    (tmp_path / "README.md").write_text("untouched", encoding="utf-8")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert readme(tmp_path) == "untouched"


def test_a_trainer_that_writes_no_card(tmp_path):
    class Silent(Trainer):
        def create_model_card(self, *args, **kwargs):
            pass

    class Mixed(TeleportMixin, Silent):
        pass

    trainer = Mixed(
        vit(), arguments(tmp_path), train_dataset=images(), teleport_config=TeleportConfig(method="null_space", steps=[0])
    )
    trainer.train()
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_a_card_of_peft_stays_one(tmp_path):
    model = get_peft_model(vit(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = trained(tmp_path, model, steps=[1])
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card()
        card = ModelCard(readme(tmp_path))
        assert card.data.library_name == "peft"
        assert {"lora", "hf_teleport", "teleportation"} <= set(card.data.tags)
        assert card.text.count(HEADING) == 1
        assert card.text.count("- PEFT ") == 1


def test_without_a_network_it_fails_as_trainer_does(tmp_path):
    def refusal(trainer_class):
        with pytest.raises(Exception, match="offline") as caught:
            trainer_class(vit(), arguments(tmp_path, push_to_hub=True, hub_model_id="m"), train_dataset=images())
        return caught.type

    assert refusal(TeleportTrainer) is refusal(Trainer)


# Over HTTP, with the real client.


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
    assert float(row[5].rstrip("%")) > 50
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
    assert HEADING in readme(hub.folder / "broken_teleport")
