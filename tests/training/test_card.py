"""Model cards: what is said of the teleports."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from pages import rows_of
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_teleport import TeleportConfig, TeleportMixin, TeleportTrainer
from hf_teleport.journal import teleports
from hf_teleport.report import TeleportReport
from hf_teleport.training.card import HEADING, add_to_card, section

from hub_training import images, vit

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
