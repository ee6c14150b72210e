"""TeleportTrainer against Trainer: off means off, the same data is seen, bad input never costs a run."""

import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_teleport import TeleportConfig, TeleportMixin, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import load_images
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification


def vit(dropout=0.1):
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=dropout,
        )
    )


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")[0].first(60)


def arguments(tmp_path, **settings):
    defaults = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    return {**defaults, **settings}


def teleport_trainer(tmp_path, data, model=None, config=None, callbacks=None, trainer_class=TeleportTrainer, **settings):
    config = config or TeleportConfig(method="null_space", epochs=2, num_batches=2, batch_size=2)
    return trainer_class(
        model or vit(),
        TrainingArguments(**arguments(tmp_path, **settings)),
        train_dataset=data,
        teleport_config=config,
        callbacks=callbacks,
    )


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Watch(TrainerCallback):
    """Keeps the random states at each optimizer step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()))


class Recording:
    """Mixed into a trainer: the batches that it trains on, in order."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingTeleportTrainer(Recording, TeleportTrainer):
    pass


@pytest.mark.parametrize("never", [0, []])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_with_no_scheduled_epoch_the_weights_are_bit_identical(tmp_path, digits, never, accumulation):
    plain = Trainer(
        vit(), TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=accumulation)), train_dataset=digits
    )
    plain.train()
    off = teleport_trainer(tmp_path, digits, config=TeleportConfig(epochs=never), gradient_accumulation_steps=accumulation)
    off.train()
    assert torch.equal(flat(plain.model), flat(off.model))
    assert [e.get("loss") for e in plain.state.log_history] == [e.get("loss") for e in off.state.log_history]


def test_teleporting_leaves_batches_and_random_numbers_alone(tmp_path, digits):
    watch_plain, watch = Watch(), Watch()
    plain = RecordingTrainer(vit(), TrainingArguments(**arguments(tmp_path)), train_dataset=digits, callbacks=[watch_plain])
    plain.train()
    trainer = teleport_trainer(tmp_path, digits, callbacks=[watch], trainer_class=RecordingTeleportTrainer)
    trainer.train()
    assert len(trainer.teleport_reports) == 2
    assert any(layer.moved for layer in trainer.teleport_reports[0].layers)
    assert not torch.equal(flat(plain.model), flat(trainer.model))
    assert len(plain.seen) == len(trainer.seen) == 16
    for a, b in zip(plain.seen, trainer.seen, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    for (torch_a, python_a, numpy_a), (torch_b, python_b, numpy_b) in zip(watch_plain.states, watch.states, strict=True):
        assert torch.equal(torch_a, torch_b)
        assert python_a == python_b
        assert (numpy_a == numpy_b).all()


def test_a_collator_with_a_generator_of_its_own_draws_the_same_for_training(tmp_path, digits):
    class Noisy:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)
            self.numpy = np.random.default_rng(3)

        def __call__(self, rows):
            images = torch.stack([row["pixel_values"] for row in rows])
            noise = torch.randn(images.shape, generator=self.generator) * float(self.numpy.random())
            return {"pixel_values": images + noise, "labels": torch.stack([row["labels"] for row in rows])}

    seen = []
    for config in (TeleportConfig(epochs=0), TeleportConfig(method="null_space", epochs=2, num_batches=2, batch_size=2)):
        trainer = RecordingTeleportTrainer(
            vit(), TrainingArguments(**arguments(tmp_path)), train_dataset=digits, data_collator=Noisy(), teleport_config=config
        )
        trainer.train()
        seen.append(trainer.seen)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(*seen, strict=True))


def test_a_loss_function_that_divides_by_the_number_of_items(tmp_path, digits):
    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = TeleportTrainer(
        vit(),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=digits,
        compute_loss_func=loss,
        teleport_config=TeleportConfig(method="null_space", epochs=1, num_batches=1, batch_size=2),
    )
    trainer.train()
    assert trainer.teleport_reports[0].loss_before == pytest.approx(2.3, rel=0.3)


def test_metrics_are_logged_under_teleport(tmp_path, digits):
    trainer = teleport_trainer(tmp_path, digits)
    trainer.train()
    events = [entry for entry in trainer.state.log_history if "teleport/steps" in entry]
    assert [entry["step"] for entry in events] == [0, 8]
    for name in ("loss_before", "loss_after", "grad_norm_before", "grad_norm_after", "null_dim", "seconds", "steps"):
        assert isinstance(events[0][f"teleport/{name}"], (int, float)), name
    assert events[0]["teleport/stopped_because"] == "max_growth"
    assert events[0]["teleport/grad_norm_after"] > 1.5 * events[0]["teleport/grad_norm_before"]
    assert events[0]["teleport/loss_after"] == pytest.approx(events[0]["teleport/loss_before"], rel=1e-5)


def test_one_line_a_teleport(tmp_path, digits, caplog):
    with caplog.at_level(logging.INFO, logger="hf_teleport"):
        teleport_trainer(tmp_path, digits).train()
    lines = [record.message for record in caplog.records if record.message.startswith("Teleport before step")]
    assert len(lines) == 2
    assert "gradient norm" in lines[0]
    assert any("weights (97% of the elements) may move" in record.message for record in caplog.records)


def test_gradient_accumulation_teleports_once_a_step(tmp_path, digits):
    trainer = teleport_trainer(tmp_path, digits, gradient_accumulation_steps=4)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "teleport/steps" in entry] == [0, 2]
    assert len(trainer.teleport_reports) == 2


def test_gradients_accumulated_so_far_do_not_exist_at_a_teleport(tmp_path, digits):
    """The event comes before the first micro-batch: no gradient of older weights is mixed with newer ones."""
    grads = []

    class Looking(TeleportTrainer):
        def teleport(self):
            grads.append([p.grad for p in self.model.parameters() if p.grad is not None])
            return super().teleport()

    teleport_trainer(tmp_path, digits, gradient_accumulation_steps=4, trainer_class=Looking).train()
    assert grads == [[], []]


def test_warmup_steps(tmp_path, digits):
    config = TeleportConfig(method="null_space", epochs=2, num_batches=1, batch_size=2, warmup_steps=3)
    trainer = teleport_trainer(tmp_path, digits, config=config)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "teleport/steps" in entry] == [3, 8]


def test_resumed_at_an_epoch_or_in_the_middle_of_one_goes_on_as_the_uninterrupted_run(tmp_path, digits):
    def trainer(folder):
        set_seed(0)
        return teleport_trainer(
            tmp_path / folder,
            digits,
            model=MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(48, 48), num_labels=10)),
            save_strategy="steps",
            save_steps=4,
        )

    whole = trainer("whole")
    whole.train()
    assert [e["step"] for e in whole.state.log_history if "teleport/steps" in e] == [0, 8]
    for step, events in ((4, 1), (8, 1), (12, 0)):
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(resumed.teleport_reports) == events
        assert torch.equal(flat(whole.model), flat(resumed.model))


def test_language_model_with_datasets_and_unused_columns(tmp_path):
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=48, n_layer=2, n_head=2, n_positions=16, vocab_size=50, bos_token_id=0, eos_token_id=0)
    )
    rows = [
        {"input_ids": [(i + j) % 50 for j in range(8)], "labels": [(i + j) % 50 for j in range(8)], "note": "x"}
        for i in range(40)
    ]
    config = TeleportConfig(method="null_space", epochs=1, num_batches=2, batch_size=2)
    trainer = teleport_trainer(tmp_path, Dataset.from_list(rows), model=model, config=config)
    trainer.train()
    layers = {layer.name: layer for layer in trainer.teleport_reports[0].layers}
    assert "tied" in layers["transformer.wte"].reason
    assert layers["transformer.h.1.attn.c_attn"].moved


def test_batch_encodings_keep_their_labels(tmp_path, digits):
    def collate(rows):
        return BatchEncoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    trainer = TeleportTrainer(
        vit(),
        TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1)),
        train_dataset=digits,
        data_collator=collate,
        teleport_config=TeleportConfig(method="null_space", epochs=1, num_batches=2, batch_size=2),
    )
    trainer.train()
    assert trainer.teleport_reports[0].steps


def test_bf16_mixed_precision_is_off_inside(tmp_path, digits):
    seen = []

    class Looking(TeleportTrainer):
        def _teleport_loss(self, model, batch):
            outputs = model(**batch)
            seen.append((outputs.logits.dtype, torch.is_autocast_enabled("cpu")))
            return outputs.loss

    trainer = teleport_trainer(tmp_path, digits, trainer_class=Looking, bf16=True)
    trainer.train()
    report = trainer.teleport_reports[0]
    assert set(seen) == {(torch.float32, False)}
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)


def test_custom_loss_and_label_smoothing(tmp_path, digits):
    trainer = teleport_trainer(tmp_path, digits, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.teleport_reports[0].steps

    class Custom(TeleportTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    custom = teleport_trainer(tmp_path, digits, trainer_class=Custom)
    custom.train()
    assert custom.teleport_reports[0].steps


def test_teleport_dataset_and_mixin(tmp_path, digits):
    class Other(Trainer):
        pass

    class Mixed(TeleportMixin, Other):
        pass

    trainer = Mixed(
        vit(),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=digits,
        teleport_dataset=digits.first(3),
        teleport_config=TeleportConfig(method="null_space", epochs=1, num_batches=5, batch_size=2),
    )
    assert [len(batch["labels"]) for batch in trainer.get_teleport_dataloader(0)] == [2, 1]
    trainer.train()
    assert len(trainer.teleport_reports) == 1


def test_the_same_event_draws_the_same_batches_and_another_event_others(tmp_path, digits):
    trainer = teleport_trainer(tmp_path, digits)

    def labels(event):
        return torch.cat([batch["labels"] for batch in trainer.get_teleport_dataloader(event)])

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(8))


# Bad input: an error or a warning before the first step, never a lost run.


def assert_error_before_training(trainer, match):
    before = flat(trainer.model)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.equal(before, flat(trainer.model))


def test_a_schedule_beyond_the_end(tmp_path, digits):
    assert_error_before_training(teleport_trainer(tmp_path, digits, config=TeleportConfig(epochs=[0, 7])), "lie beyond the run")


def test_an_unknown_target_module(tmp_path, digits):
    config = TeleportConfig(method="null_space", target_modules=["q_porj"])
    assert_error_before_training(teleport_trainer(tmp_path, digits, config=config), "near names: q_proj")


def test_no_movable_layer(tmp_path, digits):
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layernorm" in name
    assert_error_before_training(teleport_trainer(tmp_path, digits, model=model), "no weight of the model can be teleported")


def test_a_model_without_a_loss(tmp_path, digits):
    class NoLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, pixel_values, labels=None):
            return {"logits": self.layer(pixel_values.flatten(1))}

    assert_error_before_training(teleport_trainer(tmp_path, digits, model=NoLoss()), "did not return a loss")


@pytest.mark.parametrize("empty", ["train_dataset", "teleport_dataset"])
def test_an_empty_data_set(tmp_path, digits, empty):
    trainer = TeleportTrainer(
        vit(), TrainingArguments(**arguments(tmp_path)), eval_dataset=digits, **{"train_dataset": digits, empty: digits.first(0)}
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert_error_before_training(trainer, "the data set to teleport on is empty")


def test_a_teleport_by_hand_without_data(tmp_path):
    with pytest.raises(ValueError, match="the data set to teleport on is empty"):
        TeleportTrainer(vit(), TrainingArguments(**arguments(tmp_path))).teleport()


def test_a_stream_without_rows(tmp_path, digits):
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    trainer = TeleportTrainer(vit(), TrainingArguments(**arguments(tmp_path)), train_dataset=digits, teleport_dataset=Nothing())
    assert_error_before_training(trainer, "empty")


@pytest.mark.parametrize("tau", [0, 1.5])
def test_an_impossible_threshold_fails_when_the_settings_are_made(tmp_path, tau):
    with pytest.raises(ValueError, match="allowed: above 0, at most 1, or None"):
        TeleportTrainingArguments(**arguments(tmp_path), teleport_energy_threshold=tau)


def test_a_nan_loss_warns_and_training_goes_on(tmp_path, digits, caplog):
    model = vit()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    trainer = teleport_trainer(tmp_path, digits, model=model)
    with caplog.at_level(logging.WARNING, logger="hf_teleport"):
        trainer.train()
    assert trainer.state.global_step == 16
    assert any("the loss on a teleport batch is nan" in record.message for record in caplog.records)
    assert all(report.stopped_because == "non_finite" for report in trainer.teleport_reports)


def test_nan_in_one_teleport_row_costs_nothing(tmp_path, digits):
    poisoned = digits.first(60)
    poisoned = type(digits)(poisoned.images.clone(), poisoned.labels)
    poisoned.images[:] = float("nan")
    trainer = TeleportTrainer(
        vit(),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=digits,
        teleport_dataset=poisoned,
        teleport_config=TeleportConfig(method="null_space", epochs=1),
    )
    trainer.train()
    plain = Trainer(vit(), TrainingArguments(**arguments(tmp_path)), train_dataset=digits)
    plain.train()
    assert torch.equal(flat(trainer.model), flat(plain.model))


def test_nothing_to_move_is_said(tmp_path, digits, caplog):
    # More rows than dimensions, and no layer norm, whose output leaves one direction free at initialisation.
    model = MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(8, 8), num_labels=10))
    with caplog.at_level(logging.WARNING, logger="hf_teleport"):
        teleport_trainer(
            tmp_path, digits, model=model, config=TeleportConfig(method="null_space", num_batches=1, batch_size=60)
        ).train()
    assert any("changed nothing: no null space" in record.message for record in caplog.records)


def test_settings_that_are_given_twice_and_differ_are_refused(tmp_path, digits):
    config, given = TeleportConfig(epochs=2), {"train_dataset": digits}
    args = TeleportTrainingArguments(**arguments(tmp_path), teleport_method="null_space")
    with pytest.raises(ValueError, match=r"given twice.*epochs=2.*method='null_space'.*leave out one of them"):
        TeleportTrainer(vit(), args, **given, teleport_config=config)
    equal = TeleportTrainer(vit(), args, **given, teleport_config=TeleportConfig(method="null_space"))
    untouched = TeleportTrainer(vit(), TeleportTrainingArguments(**arguments(tmp_path)), **given, teleport_config=config)
    assert (equal.teleport_config.method, untouched.teleport_config) == ("null_space", config)
