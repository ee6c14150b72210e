"""TRL's trainers with the mixin: they teleport, log their own metrics as before, and save ordinary models."""

from dataclasses import dataclass

import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_teleport import TeleportConfig, TeleportMixin
from hf_teleport.arguments import TeleportArguments
from hf_teleport.training.card import HEADING

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# TRL sets it by default.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing\\w*. is deprecated:FutureWarning")

LINES = ["the cat sat on the mat", "the dog sat on the log", "a bird in the hand", "two birds in the bush"] * 4
ANSWERS = [{"prompt": "the cat", "chosen": " sat on the mat", "rejected": " in the bush"}] * 8


class TeleportSFTTrainer(TeleportMixin, SFTTrainer):
    pass


class TeleportDPOTrainer(TeleportMixin, DPOTrainer):
    pass


class TeleportGRPOTrainer(TeleportMixin, GRPOTrainer):
    pass


@dataclass
class TeleportSFTConfig(TeleportArguments, SFTConfig):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special))


def settings(folder, **others):
    few = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(folder), **few, **quiet, **others}


def event(method="null_space", steps=(3,)):
    return TeleportConfig(steps=list(steps), num_batches=2, batch_size=1, steps_per_batch=2).for_method(method)


def rows():
    return datasets.Dataset.from_dict({"text": LINES})


def logged(trainer):
    """Rows of the log, without those of teleports and what depends on the clock."""
    rows = [row for row in trainer.state.log_history if "teleport/steps" not in row]
    return [{name: value for name, value in row.items() if "runtime" not in name and "per_second" not in name} for row in rows]


@pytest.mark.parametrize("method", ["null_space", "basis"])
def test_sft(method, tmp_path, tokenizer):
    made = {"train_dataset": rows(), "processing_class": tokenizer, "teleport_config": event(method)}
    trainer = TeleportSFTTrainer(llama(tokenizer), SFTConfig(**settings(tmp_path)), **made)
    trainer.train()
    (report,) = trainer.teleport_reports
    assert report.steps
    assert not report.rolled_back
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)
    stay = {layer.name: layer.reason for layer in report.layers if not layer.moved}
    if method == "basis":
        assert not stay, "TRL's fused head reads the stream, and everything turns"
    else:
        assert report.grad_norm_after > 1.2 * report.grad_norm_before
        assert "custom kernel" in stay["lm_head"], "it is multiplied inside an autograd function"
        assert not [name for name in stay if name.endswith("_proj")]

    trainer.save_model()
    trainer.create_model_card()
    assert HEADING in (tmp_path / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in trainer.model.state_dict().items())


def test_sft_makes_adapters_that_teleport(tmp_path, tokenizer):
    made = {"train_dataset": rows(), "processing_class": tokenizer, "teleport_config": event("null_space+basis")}
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = TeleportSFTTrainer(llama(tokenizer), SFTConfig(**settings(tmp_path)), peft_config=adapters, **made)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    for report in trainer.teleport_reports:
        assert report.steps
        assert all("lora_" in layer.name for layer in report.layers if layer.moved)
    assert {s.kind for s in trainer.teleport_reports[1].symmetries if not s.reason} == {"chain"}
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)


def test_metrics_of_training_and_evaluation_are_those_of_training_and_evaluation(tmp_path, tokenizer):
    def run(trainer_class, **own):
        torch.manual_seed(0)
        made = {"train_dataset": rows(), "eval_dataset": rows().select(range(4)), "processing_class": tokenizer}
        arguments = SFTConfig(**settings(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=2))
        trainer = trainer_class(llama(tokenizer), arguments, **made, **own)
        trainer.train()
        return trainer

    # In its last step, before the log that averages over two; at learning rate 0, and turned only, the model stays the same.
    teleporting = run(TeleportSFTTrainer, teleport_config=event("basis", [1, 3]))
    assert len(teleporting.teleport_reports) == 2
    expected = logged(run(SFTTrainer))
    assert any("mean_token_accuracy" in row for row in expected)
    assert any("eval_entropy" in row for row in expected)
    for row, other in zip(logged(teleporting), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3), "turned gradients differ in their last digits"
    assert not [row for row in teleporting.state.log_history if {"teleport/steps", "entropy"} <= set(row)]


def test_settings_beside_those_of_trl(tmp_path, tokenizer):
    arguments = TeleportSFTConfig(**settings(tmp_path, teleport_steps=[3], teleport_num_batches=2, teleport_batch_size=1))
    trainer = TeleportSFTTrainer(llama(tokenizer), arguments, train_dataset=rows(), processing_class=tokenizer)
    assert trainer.teleport_config == TeleportConfig(steps=[3], num_batches=2, batch_size=1)


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])], ids=["whole", "lora"])
def test_dpo(adapters, tmp_path, tokenizer):
    reference = {} if adapters else {"ref_model": llama(tokenizer)}
    answers = datasets.Dataset.from_list(ANSWERS)
    made = {"train_dataset": answers, "processing_class": tokenizer, "peft_config": adapters, **reference}
    trainer = TeleportDPOTrainer(llama(tokenizer), args=DPOConfig(**settings(tmp_path)), teleport_config=event(), **made)
    trainer.train()
    (report,) = trainer.teleport_reports
    assert report.steps
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)


def test_grpo_is_refused_before_it_generates_anything(tmp_path, tokenizer):
    def reward(completions, **others):
        pytest.fail("something was generated")

    prompts = datasets.Dataset.from_list([{"prompt": line} for line in LINES])
    arguments = GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4))
    made = {"train_dataset": prompts, "processing_class": tokenizer, "teleport_config": event()}
    trainer = TeleportGRPOTrainer(llama(tokenizer), reward, arguments, **made)
    with pytest.raises(ValueError, match=r"TeleportGRPOTrainer generates its batches .*SFTTrainer, DPOTrainer.* epochs=0"):
        trainer.train()
