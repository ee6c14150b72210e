"""What the tests of Transformers ask of Trainer, asked of TeleportTrainer too: with teleports off it is the same run to the last
bit, and with one everything is the same but the weights and what follows from them."""

import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_teleport import TeleportMixin
from hf_teleport.journal import JOURNAL
from hf_teleport.training.plan import TRACKED

from tiny_runs import Stream, Texts, arguments, assert_moved, flat, hub_texts, llama, pad, teleports

TELEPORT = teleports(steps_per_batch=1)
NULL_SPACE = teleports("null_space", steps_per_batch=1)
OFF = teleports(steps=[])


def model(layers=1):
    return llama(attention_dropout=0.1, num_hidden_layers=layers)


def half_frozen():
    made = model(layers=2)
    made.model.layers[0].requires_grad_(False)
    return made


def hub_stream():
    return hub_texts().to_iterable_dataset().shuffle(seed=1)


def transformed():
    return hub_texts().with_transform(lambda rows: {"input_ids": rows["input_ids"], "labels": rows["input_ids"]})


def _event(name):
    def note(self, args, state, control, logs=None, **kwargs):
        if logs is None or not any(key.startswith("teleport/") for key in logs):
            self.events.append((name, state.global_step, sorted(logs or ()), torch.get_rng_state().tolist()))

    return note


class Record(TrainerCallback):
    """Every event in order, each with the step, what was logged, and the random state."""

    def __init__(self):
        self.events = []


for _name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Record, _name, _event(_name))


class Control(TrainerCallback):
    """Sets flags of the control, all of them before the steps are made or after."""

    def __init__(self, when, **flags):
        self.when, self.flags = when, flags

    def _set(self, when, state, control):
        for flag, steps in self.flags.items():
            if when == self.when and state.global_step in steps:
                setattr(control, flag, True)

    def on_step_begin(self, args, state, control, **kwargs):
        self._set("before", state, control)

    def on_step_end(self, args, state, control, **kwargs):
        self._set("after", state, control)


class Recording:
    """Mixed into a trainer, as all of the following: the batches that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append({k: v.tolist() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class NanLoss:
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss


class OutOfMemory:
    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


class OwnLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def summed_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def score(prediction, compute_result=True):
    return {"rows": len(prediction.predictions), "inputs": prediction.inputs is not None, "losses": prediction.losses is not None}


class Scores:
    """A metric that is the same in every run, and has its best value in the second evaluation."""

    def __init__(self):
        self.values = iter([0.2, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])

    def __call__(self, prediction):
        return {"score": next(self.values)}


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))}


def case(name, made=lambda model: {}, model=model, mixin=object, config=TELEPORT, marks=(), **settings):
    """How to make a run: training arguments, what the trainer gets besides (made anew for each run), and what else is special."""
    own = SimpleNamespace(settings=settings, made=made, model=model, mixin=mixin, config=config)
    return pytest.param(own, id=name, marks=marks)


def with_data(make):
    return lambda model: {"train_dataset": make()}


def with_metrics(make, **more):
    return lambda model: {"compute_metrics": make(), **more}


def with_callbacks(*make):
    return lambda model: {"callbacks": [each() for each in make]}


EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
BEST = {"metric_for_best_model": "score", "greater_is_better": True, **EVERY_2}
ASKED = {"should_log": [2, 3], "should_evaluate": [2, 3], "should_save": [2]}

CASES = [
    # how long, and what on
    case("epochs"),
    case("half_an_epoch_more", num_train_epochs=1.5),
    case("max_steps_in_an_epoch", max_steps=4),
    case("max_steps_over_epochs", max_steps=7),
    case("accumulation", gradient_accumulation_steps=2),
    case("accumulation_beyond_an_epoch", gradient_accumulation_steps=8, num_train_epochs=4),
    case("drop_last", dataloader_drop_last=True),
    case("grouped_by_length", train_sampling_strategy="group_by_length"),
    case("rebalanced", train_sampling_strategy="batch_rebalance"),
    case("sequential", train_sampling_strategy="sequential"),
    case("seeds", seed=3, data_seed=4),
    case("workers", dataloader_num_workers=1),
    case("smaller_batches_after_running_out_of_memory", mixin=OutOfMemory, auto_find_batch_size=True),
    case("stream_shorter_than_the_run", made=with_data(Stream), max_steps=7),
    case("stream_of_the_hub", made=with_data(hub_stream), max_steps=7),
    case("unused_columns", made=with_data(hub_texts)),
    case("unused_keys", made=with_data(lambda: Texts(unused=True))),
    case("columns_kept", made=with_data(lambda: hub_texts(unused=False)), remove_unused_columns=False),
    case("columns_made_in_flight", made=with_data(transformed), remove_unused_columns=False),
    # losses
    case("label_smoothing", label_smoothing_factor=0.1),
    case("own_compute_loss", mixin=OwnLoss),
    case("compute_loss_func", made=lambda model: {"compute_loss_func": summed_loss}, gradient_accumulation_steps=2),
    case("tokens_not_averaged", average_tokens_across_devices=False),
    case("nan_loss_filtered", mixin=NanLoss),
    case("nan_loss_logged", mixin=NanLoss, logging_nan_inf_filter=False),
    case("neftune", neftune_noise_alpha=5.0),
    # optimizers and schedules
    case("adafactor", optim="adafactor"),
    case("adagrad", optim="adagrad"),
    case("rmsprop", optim="rmsprop"),
    case("weight_decay", weight_decay=0.1, adam_beta2=0.95),
    case("sgd", optim="sgd", config=NULL_SPACE),
    case("own_optimizer_and_schedule", made=sgd, config=NULL_SPACE),
    case("optimizer_class", made=lambda model: {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-2})}),
    case("cosine_with_warmup", lr_scheduler_type="cosine", warmup_steps=3),
    case("plateau", lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"threshold": 1e9, "patience": 0}, **EVERY_2),
    case("no_clipping", max_grad_norm=0.0),
    case("model_init", made=lambda _: {"model": None, "model_init": lambda: model()}),
    case("frozen", model=half_frozen),
    # precision and memory
    case("bf16", bf16=True),
    case("activation_checkpointing", activation_checkpointing=True),
    case("empty_cache", torch_empty_cache_steps=1),
    case("full_determinism", full_determinism=True),
    # logs
    case("log_first_and_some", logging_first_step=True, logging_steps=3),
    case("log_epochs", logging_strategy="epoch"),
    case("tokens_seen", include_num_input_tokens_seen="all"),
    case("tokens_seen_without_padding", include_num_input_tokens_seen="non_padding"),
    # evaluation
    case("evaluate_on_start", eval_on_start=True, eval_strategy="epoch"),
    case("evaluate_late", eval_delay=5, **EVERY_2),
    case("evaluate_several", made=lambda model: {"eval_dataset": {"a": Texts(5), "b": Texts(6)}}, eval_strategy="epoch"),
    case("evaluate_stream", made=lambda model: {"eval_dataset": Stream()}, eval_strategy="epoch"),
    case("metrics", made=with_metrics(lambda: score), include_for_metrics=["inputs", "loss"], eval_strategy="epoch"),
    case("metrics_by_batch", made=with_metrics(lambda: score), batch_eval_metrics=True, eval_strategy="epoch"),
    case(
        "metrics_of_some_logits",
        made=with_metrics(lambda: score, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)),
        eval_accumulation_steps=1,
        eval_strategy="epoch",
    ),
    case("predictions_not_joined", eval_do_concat_batches=False),
    case("loss_only", prediction_loss_only=True, eval_strategy="epoch"),
    case("label_names", label_names=["labels", "attention_mask"], eval_strategy="epoch"),
    # checkpoints
    case("checkpoints", save_strategy="steps", save_steps=2),
    case("checkpoints_of_weights", save_strategy="steps", save_steps=2, save_only_model=True),
    case("checkpoint_limit", save_strategy="epoch", save_total_limit=1),
    case("best_at_end", made=with_metrics(Scores), save_strategy="steps", load_best_model_at_end=True, **BEST),
    case("save_best", made=with_metrics(Scores), save_strategy="best", **BEST),
    case(
        "early_stopping",
        made=lambda model: {"compute_metrics": Scores(), "callbacks": [EarlyStoppingCallback(2)]},
        save_strategy="steps",
        load_best_model_at_end=True,
        **BEST,
    ),
    # control
    case("stop", made=with_callbacks(lambda: Control("after", should_training_stop=[3]))),
    case(
        "stop_in_an_accumulation",
        made=with_callbacks(lambda: Control("before", should_training_stop=[3])),
        gradient_accumulation_steps=2,
    ),
    case("stop_an_epoch", made=with_callbacks(lambda: Control("after", should_epoch_stop=[3]))),
    case("asked_after_a_step", made=with_callbacks(lambda: Control("after", **ASKED)), logging_strategy="no"),
    case("asked_before_a_step", made=with_callbacks(lambda: Control("before", **ASKED)), logging_strategy="no"),
]


def run(case, folder, config=None, checkpoint=None):
    """A run with Trainer, or with TeleportTrainer if there is a config: the trainer, what must be the same, and what need not."""
    record, model = Record(), case.model()
    made = {"model": model, "train_dataset": Texts(), "eval_dataset": Texts(7, seed=1), "data_collator": pad, **case.made(model)}
    made["callbacks"] = [*made.get("callbacks", []), record]
    bases = [Recording, case.mixin, *([] if config is None else [TeleportMixin]), Trainer]
    trainer_class = type("Tried", tuple(base for base in bases if base is not object), {})
    own = {} if config is None else {"teleport_config": config}
    trainer = trainer_class(args=arguments(folder, **case.settings), **made, **own)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    logs = [entry for entry in trainer.state.log_history if "teleport/steps" not in entry]
    trainer.compute_metrics = None
    known = {
        "events": record.events,
        "seen": trainer.seen,
        "steps": output.global_step,
        "epoch": trainer.state.epoch,
        "metrics": sorted(output.metrics),
        "tokens": trainer.state.num_input_tokens_seen,
        "flos": trainer.state.total_flos,
        "logged": [(entry["step"], entry.get("learning_rate"), sorted(entry)) for entry in logs],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in (JOURNAL, TRACKED)),
        "best": os.path.relpath(trainer.state.best_model_checkpoint or folder, folder),
        "trainable": trainer.get_num_trainable_parameters(),
        "rates": trainer.get_learning_rates(),
        "predicted": tree_map(np.shape, trainer.predict(Texts(7, seed=1))),
        "predicted_without_labels": tree_map(np.shape, trainer.predict([{"input_ids": row["input_ids"]} for row in Texts(3)])),
    }
    losses = [(entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss")) for entry in logs]
    return trainer, known, (flat(trainer.model), str(losses))


@pytest.fixture(autouse=True)
def kept_settings():
    """`full_determinism` is for the whole process."""
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_a_teleport_leaves_the_rest_of_a_run_as_it_is(tmp_path, case):
    _, known, (weights, losses) = run(case, tmp_path / "plain")
    _, known_off, (weights_off, losses_off) = run(case, tmp_path / "off", OFF)
    assert known_off == known
    assert torch.equal(weights_off, weights)
    assert losses_off == losses
    trainer, known_on, (weights_on, _) = run(case, tmp_path / "on", case.config)
    assert known_on == known
    assert not torch.equal(weights_on, weights)
    assert_moved(trainer)


@pytest.mark.parametrize(
    "case",
    [
        case("as_it_was"),
        case("with_smaller_batches", per_device_train_batch_size=2),
        case("with_accumulation", gradient_accumulation_steps=2),
        case("for_longer", num_train_epochs=3),
        case("without_skipping_data", ignore_data_skip=True),
    ],
)
def test_a_run_resumed_with_other_settings(tmp_path, case):
    start = SimpleNamespace(**{**vars(case), "settings": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}})
    run(start, tmp_path / "start")
    checkpoint = str(tmp_path / "start" / "checkpoint-1")
    _, known, (weights, losses) = run(case, tmp_path / "plain", checkpoint=checkpoint)
    _, known_off, (weights_off, losses_off) = run(case, tmp_path / "off", OFF, checkpoint)
    assert known_off == known
    assert torch.equal(weights_off, weights)
    assert losses_off == losses
    trainer, known_on, _ = run(case, tmp_path / "on", case.config, checkpoint)
    assert known_on == known
    assert_moved(trainer)
