"""Data sets and networks of experiments: models of Transformers, masked words, saved models."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_teleport.lab.runs import execute, make_trainer
from hf_teleport.lab.settings import plan, read

from tiny_experiments import MODELS, SHORT, history, needs_data, trained

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert_mlm": "BertForMaskedLM",
    "bert": "BertForSequenceClassification",
    "llama_classifier": "LlamaForSequenceClassification",
    "vit": "ViTForImageClassification",
    "forecaster": "SeriesTransformer",
}


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_train_and_teleport(short, name):
    workload, one = trained(short(name))
    rows = history(one)
    (event,) = [row for row in rows if "teleport/steps" in row]
    assert event["teleport/loss_after"] == pytest.approx(event["teleport/loss_before"], rel=1e-3)
    (test,) = [row for row in rows if "eval_test_loss" in row]
    assert 0 < test["eval_test_loss"] < 20
    measure = {"bert": "accuracy", "llama_classifier": "accuracy", "vit": "accuracy", "forecaster": "mse"}.get(name, "perplexity")
    assert f"eval_test_{measure}" in test
    # Trainer divides GPT-2's loss by all tokens, the first ones too, for its config names no loss.
    if measure == "perplexity" and name != "gpt2":
        assert test["eval_test_perplexity"] == pytest.approx(math.exp(test["eval_test_loss"]), rel=1e-4)
    model, data = workload.make_model(workload.data), workload.data
    assert type(model).__name__ == CLASSES[name]
    config, tokens = model.config, data.tokenizer
    if name == "vit":
        assert (config.image_size, config.num_channels, config.num_labels, config.patch_size) == (28, 1, 10, 14)
    elif name == "forecaster":
        assert (config.context, config.horizon, config.channels) == (8, 3, 7)
        assert data.train[0]["labels"].shape == (3, 7)
    else:
        assert (config.vocab_size, config.max_position_embeddings) == (len(tokens), 16)
        assert config.pad_token_id == tokens.pad_token_id
    if name in ("bert", "llama_classifier"):
        assert config.num_labels == 2
    if name in ("llama", "qwen3"):
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (name == "qwen3")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (
            "llama",
            ["--sizes.hiden_size", "8"],
            r"unknown key 'hiden_size' in .* 'llama'; the nearest is 'hidden_size'",
        ),
        ("gpt2", ["--sizes.n_emb", "8"], r"the nearest is 'n_embd'"),
        ("bert", ["--sizes.hidden_size", "many"], r"sizes of 'bert': (?s:.)*'hidden_size' expected int"),
        ("bert", ["--dataset", "ptb"], r"model = 'bert' classifies texts, but label_column = None"),
        (
            "llama",
            ["--dataset", "sst2"],
            r"'llama' reads running text, but label_column = 'label'; .* kind: text",
        ),
        ("vit", ["--dataset", "ptb"], r"takes data of kind 'image'"),
        (
            "llama",
            ["--mask_probability", "0.2"],
            r"= 0.2 is not allowed with model = 'llama'; allowed: bert_mlm",
        ),
        ("bert_mlm", ["--mask_probability", "2"], r"mask_probability = 2 is not allowed; allowed: a number between 0 and 1"),
        ("bert_mlm", ["--dataset", "sst2"], r"'bert_mlm' reads running text, but label_column = 'label'"),
        ("llama", ["--adapter", "4"], r"adapter = 4 is not allowed; allowed: a mapping of settings of peft.LoraConfig, such as"),
        ("llama", ["--adapter.rank", "4"], r"unknown key 'rank' in adapter, settings of peft.LoraConfig; the nearest is"),
        ("llama", ["--adapter.layers_pattern", "[layers]"], r"`layers_to_transform` must also be specified"),
        ("vit", ["--save_model", "maybe"], r"save_model = 'maybe' is not allowed; allowed: true or false"),
    ],
)
def test_settings_that_do_not_suit_a_model(config, model, words, message):
    with pytest.raises(ValueError, match=message):
        plan(read(config(**{**SHORT, "model": model, **MODELS[model], "folder": None}), words))


@needs_data
def test_one_size_has_one_value_whatever_its_name(short):
    """GPT-2's `n_positions` is `max_position_embeddings` elsewhere, which the data decide where the file does not."""
    workload = plan(read(short("gpt2"), ["--sizes.n_positions", "20"])).workload
    assert workload.make_model(workload.data).config.n_positions == 20


@needs_data
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "mlp"])
def test_a_saved_model_is_gone_on_with(short, config, tmp_path, name):
    file = config(**SHORT) if name == "mlp" else short(name)
    _, first = trained(file, "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    files = ["done", "history.json", "model", "settings.json", "teleports.json"]
    assert sorted(path.name for path in first.folder.iterdir()) == files
    saved = first.folder / "model"
    workload, one = trained(file, "--pretrained", str(saved), "--output_dir", str(tmp_path / "tuning"))
    assert not (one.folder / "model").exists()
    kept = workload.network.auto.from_pretrained(saved)
    # The file names the saved model's sizes, and need not.
    for sizes in (workload.sizes, {}):
        model = replace(workload, sizes=sizes).make_model(workload.data)
        torch.testing.assert_close(model.state_dict(), kept.state_dict(), rtol=0, atol=0)
    losses = [[row["loss"] for row in history(r) if "loss" in row] for r in (first, one)]
    assert losses[0][0] != losses[1][0]
    if name in ("bert", "llama"):
        assert workload.data.tokenizer.get_vocab() == plan(read(file)).workload.data.tokenizer.get_vocab()


@needs_data
def test_another_number_of_classes_gets_a_new_head_and_the_tokenizer_stays(short, heads, tmp_path):
    """Fine-tuned on text with other words and three classes."""
    _, first = trained(short("bert"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved, other = first.folder / "model", tmp_path / "other"
    other.mkdir()
    for part in ("train", "test"):
        rows = [{"sentence": f"a {word} film", "label": i % 3} for i, word in enumerate(["good", "bad", "zzyzx"] * 8)]
        pd.DataFrame(rows).to_parquet(other / f"{part}.parquet")
    workload, _ = trained(short("bert", folder=str(other), pretrained=str(saved)))
    model, tokenizer = workload.make_model(workload.data), workload.data.tokenizer
    assert model.classifier.weight.shape[0] == 3
    assert tokenizer.get_vocab() == plan(read(short("bert"))).workload.data.tokenizer.get_vocab()
    kept = AutoModelForSequenceClassification.from_pretrained(saved)
    torch.testing.assert_close(model.bert.state_dict(), kept.bert.state_dict(), rtol=0, atol=0)


@needs_data
def test_saved_models_that_do_not_fit(short, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pretrained = 'no/where' has no saved model: .* save_model: true"):
        plan(read(short("bert"), ["--pretrained", "no/where"]))
    _, first = trained(short("bert"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved = first.folder / "model"

    def model_of(*words):
        workload = plan(read(short("bert"), ["--pretrained", str(saved), *words])).workload
        return workload.make_model(workload.data)

    with pytest.raises(ValueError, match=r"intermediate.dense.bias has the shape \[32\] by sizes = .* allowed: \[24\]"):
        model_of("--sizes.intermediate_size", "32")
    with pytest.raises(ValueError, match=r"max_position_embeddings = 20 of the data is not allowed; allowed: 16, as in"):
        model_of("--length", "20")
    with pytest.raises(ValueError, match=r"vocabulary_size = 50 is not allowed; allowed: None, because the tokenizer has"):
        model_of("--vocabulary_size", "50")
    with pytest.raises(ValueError, match=r"model = 'llama' is not allowed; allowed: a 'bert', as in pretrained = "):
        plan(read(short("llama"), ["--pretrained", str(saved)]))
    # Runs from weights of their own are others.
    experiment = plan(read(short("bert")))
    execute(experiment)
    with pytest.raises(ValueError, match=r"pretrained = .* is not allowed; allowed: not given"):
        execute(plan(read(short("bert"), ["--pretrained", str(saved)])))
    (saved / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer, and its embeddings are useless without it"):
        plan(read(short("bert"), ["--pretrained", str(saved)]))


@needs_data
@pytest.mark.parametrize("name", ["llama", "llama_classifier"])
def test_adapters_of_a_saved_model_are_trained_and_the_model_is_not(short, tmp_path, name):
    _, first = trained(short("llama"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved = first.folder / "model"
    arms = {"basis": {"teleport_method": "basis", "teleport_steps": "1", "teleport_frozen_weights": "turn"}}
    adapter = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    settings = {"teleport_warmup_steps": 0, "teleport_steps_per_batch": 8, "sizes": {}, "save_model": True}
    settings |= {"arms": arms, "pretrained": str(saved), "adapter": adapter}
    workload, one = trained(short(name, **settings))
    (event,) = [row for row in history(one) if "teleport/steps" in row]
    assert event["teleport/loss_after"] == pytest.approx(event["teleport/loss_before"], rel=1e-4)
    model, kept = workload.make_model(workload.data), workload.network.auto.from_pretrained(saved)
    trainable = {part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".") if part != "weight"}
    assert {"lora_A", "lora_B", "q_proj", "down_proj"} <= trainable
    assert ("score" in trainable) == (name == "llama_classifier")
    torch.testing.assert_close(model.get_base_model().model.norm.weight, kept.model.norm.weight, rtol=0, atol=0)
    # What a run saves is the adapter, which fits the saved model.
    tuned = PeftModel.from_pretrained(kept, one.folder / "model").state_dict()
    assert sum(bool(value.any()) for name, value in tuned.items() if "lora_B" in name) == 7
    with pytest.raises(ValueError, match=r"adapter = .* is not allowed; allowed: {'r': 2"):
        execute(plan(read(short(name, **settings), ["--adapter.r", "3"])))
    words = ["--adapter.target_modules", "[q_prj]", "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match=r"Target modules .*'q_prj'.* not found in the base model|No modules were targeted"):
        execute(plan(read(short(name, **settings), words)))


# --- masked words, and what a seed decides --------------------------------------------------------------------------------------


def trainer_of(file, *words):
    experiment = plan(read(file, words))
    return make_trainer(experiment.runs[0], experiment.workload, experiment.workload.data, {})


def batches(trainer):
    """What the model was given in training."""
    seen = []

    def note(module, positional, inputs):
        if module.training:
            seen.append(inputs["input_ids"].clone())

    handle = trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    handle.remove()
    return torch.stack(seen)


@needs_data
@pytest.mark.parametrize("name", ["llama", "bert_mlm"])
def test_weights_and_batches_depend_on_the_seed_alone(short, name):
    file = short(name, arms={"off": {"teleport_epochs": 0}}, max_steps=4)

    def found(*words):
        trainer = trainer_of(file, *words)
        weights = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        return weights, batches(trainer)

    weights, seen = found()
    same_weights, same_seen = found("--learning_rates", "0.1", "--eval_steps", "1", "--arms.off.optimizer", "SOAP")
    assert torch.equal(weights, same_weights)
    assert torch.equal(seen, same_seen)
    _, wider_seen = found("--sizes.hidden_size", "32")
    assert torch.equal(seen, wider_seen)
    other_weights, other_seen = found("--seeds", "1")
    assert not torch.equal(weights, other_weights)
    assert not torch.equal(seen, other_seen)


@needs_data
def test_masked_rows_of_evaluation_are_the_same_for_every_seed_and_those_of_training_are_not(short):
    trainers = [trainer_of(short("bert_mlm"), "--seeds", str(seed)) for seed in (0, 1)]
    first, second = (trainer.eval_dataset["test"].columns for trainer in trainers)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(first[name], second[name])
    assert (first["labels"] != -100).float().mean() == pytest.approx(0.15, abs=0.1)
    rows = [trainers[0].train_dataset[i] for i in range(4)]
    masks = [trainer.data_collator(list(rows))["labels"] for trainer in (*trainers, trainers[0])]
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    # In another batch the same row has other masks.
    assert not torch.equal(trainers[0].data_collator([rows[0], rows[2]])["labels"][0], masks[0][0])


@needs_data
def test_a_classifier_starts_from_a_masked_language_model(short, tmp_path):
    _, first = trained(short("bert_mlm"), "--save_model", "true", "--output_dir", str(tmp_path / "pretraining"))
    saved = first.folder / "model"
    workload, one = trained(short("bert", pretrained=str(saved), sizes={}))
    assert workload.make_model(workload.data).config.vocab_size == len(workload.data.tokenizer)
    kept = AutoModelForMaskedLM.from_pretrained(saved)
    model = workload.make_model(workload.data)
    torch.testing.assert_close(model.bert.encoder.state_dict(), kept.bert.encoder.state_dict(), rtol=0, atol=0)
    assert [row["step"] for row in history(one) if "eval_test_accuracy" in row] == [2]
