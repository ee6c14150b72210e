"""Code of a user's own in a trainer and its callbacks: a teleport leaves no trace in what it notes, counts and logs."""

from collections import Counter, defaultdict, deque
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_teleport import TeleportConfig, TeleportMixin, TeleportTrainer
from hf_teleport.html import write
from hf_teleport.journal import JOURNAL
from hf_teleport.journal import teleports as events_of
from hf_teleport.lab.data import load_images
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification
from hf_teleport.training.plan import Course, Plan
from hf_teleport.weights.isolation import unnoted

from tiny_runs import Texts, arguments, assert_moved, flat, llama, make, pad, teleports

EVENT = teleports("null_space", steps=[2])


class Heard(TrainerCallback):
    """What a tracker is told, without the rows of teleports."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not any(name.startswith("teleport/") for name in logs):
            self.rows.append((state.global_step, sorted(logs)))


def run(folder, mixin, teleporting, checkpoint=None, callbacks=(), **settings):
    """A run with Trainer, or the same with an event. Returns the trainer, and what its tracker heard."""
    heard = Heard()
    bases = (mixin, TeleportMixin, Trainer) if teleporting else (mixin, Trainer)
    own = {"teleport_config": EVENT} if teleporting else {}
    trainer = type("Tried", bases, {})(
        llama(),
        arguments(folder, **{"max_steps": 4, **settings}),
        train_dataset=Texts(),
        data_collator=pad,
        callbacks=[heard, *callbacks],
        **own,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, heard.rows


def noted_alike(tmp_path, mixin, noted, **settings):
    """Both runs tell and note the same."""
    plain, heard_plain = run(tmp_path / "plain", mixin, False, **settings)
    trainer, heard = run(tmp_path / "on", mixin, True, **settings)
    assert_moved(trainer)
    assert heard == heard_plain
    names = [sorted(row) for row in trainer.state.log_history if "teleport/steps" not in row]
    assert names == [sorted(row) for row in plain.state.log_history]
    assert noted(trainer) == noted(plain)
    return trainer


# --- Logs -------------------------------------------------------------------------------------------------------------------


class LogsItsLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.say({"my_loss": float(loss)})
        return loss

    def say(self, row):
        self.log(row)


class LogsPastItsOwnLog(LogsItsLoss):
    def say(self, row):
        Trainer.log(self, row)


class TellsCallbacks(LogsItsLoss):
    def say(self, row):
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)


class WritesHistory(LogsItsLoss):
    def say(self, row):
        self.state.log_history.append({**row, "step": self.state.global_step})


@pytest.mark.parametrize("mixin", [LogsItsLoss, LogsPastItsOwnLog, TellsCallbacks, WritesHistory])
def test_what_a_loss_logs_inside_a_teleport_is_not_logged(tmp_path, mixin):
    noted_alike(tmp_path, mixin, lambda trainer: None)


class ReadsTheLoss:
    """A log that knows three kinds of rows: of training, of its end and of evaluations."""

    def log(self, logs, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        if "train_runtime" not in logs and not any(name.startswith("eval_") for name in logs):
            logs["perplexity"] = 2.7 ** logs["loss"]
        super().log(logs, *args, **kwargs)


def test_a_log_of_ones_own_gets_the_rows_that_it_gets_without_teleports(tmp_path):
    trainer = noted_alike(tmp_path, ReadsTheLoss, lambda trainer: trainer.calls, eval_strategy="no")
    assert [row["step"] for row in trainer.state.log_history if "teleport/steps" in row] == [2]


# --- Notes ------------------------------------------------------------------------------------------------------------------


class Notes:
    """Everything that a trainer may count by."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.last, self.name = 0, None, ""
        self.rows, self.recent, self.seen, self.kinds = [], deque(maxlen=3), set(), Counter()
        self.by_mode = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.total = torch.zeros(())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        value = float(loss)
        self.calls += 1
        self.last, self.name = self.calls, f"{self.name}."
        self.rows.append(self.calls)
        self.recent.append(self.calls)
        self.seen.add(self.calls)
        self.kinds["loss"] += 1
        self.by_mode["train"]["calls"].append(self.calls)
        self.total += 1
        self.late = getattr(self, "late", 0) + 1  # made at its first use
        assert value == value
        return loss

    def noted(self):
        notes = self.calls, self.last, self.name, self.rows, list(self.recent), self.seen, self.kinds, self.late
        return notes, {mode: dict(found) for mode, found in self.by_mode.items()}, float(self.total)


def test_notes_of_a_loss_inside_a_teleport_are_gone(tmp_path):
    trainer = noted_alike(tmp_path, Notes, lambda trainer: trainer.noted())
    assert trainer.calls == 4


def test_what_is_loaded_at_its_first_use_stays(tmp_path):
    class Teacher(TeleportTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not hasattr(self, "teacher"):
                self.teacher = llama()
                Teacher.loads = getattr(Teacher, "loads", 0) + 1
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    trainer = make(tmp_path, config=EVENT, trainer_class=Teacher, max_steps=3)
    trainer.train()
    assert_moved(trainer)
    assert Teacher.loads == 1


def test_notes_are_back_after_an_error_too(tmp_path):
    trainer = make(tmp_path)
    trainer.rows, handler = [1], trainer.callback_handler
    callbacks, rows = handler.callbacks, trainer.rows

    @unnoted(trainer)
    def failing():
        trainer.rows.append(2)
        trainer.log({"x": 1.0})
        raise RuntimeError("the cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        failing()
    assert trainer.rows is rows == [1]
    assert handler.callbacks is callbacks
    assert "log" not in vars(trainer)
    assert trainer.state.log_history == []


class CountsBatches:
    fetched = 0

    def get_batch_samples(self, *args, **kwargs):
        self.fetched += 1
        return super().get_batch_samples(*args, **kwargs)


class CountsLoaders:
    made = 0

    def get_train_dataloader(self):
        self.made += 1
        return super().get_train_dataloader()


class CountsSamplers:
    made = 0

    def _get_train_sampler(self, *args, **kwargs):
        self.made += 1
        return super()._get_train_sampler(*args, **kwargs)


class Nothing:
    pass


class CountsItems:
    """A count of its own for what a loss is divided by, which an event must divide by too."""

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        return None if count is None else 2 * count


@pytest.mark.parametrize(
    ("mixin", "noted"),
    [
        (CountsBatches, lambda trainer: trainer.fetched),
        (CountsLoaders, lambda trainer: trainer.made),
        (CountsSamplers, lambda trainer: trainer.made),
        (CountsItems, lambda trainer: None),
    ],
)
def test_methods_that_count_their_calls(tmp_path, mixin, noted):
    noted_alike(tmp_path, mixin, noted)


def test_a_count_of_ones_own_is_that_of_an_event_too(tmp_path):
    half, _ = run(tmp_path / "half", CountsItems, True)
    whole, _ = run(tmp_path / "whole", Nothing, True, learning_rate=0.0)
    half_at_rest, _ = run(tmp_path / "rest", CountsItems, True, learning_rate=0.0)
    assert half_at_rest.teleport_reports[0].loss_before == pytest.approx(whole.teleport_reports[0].loss_before / 2, rel=1e-5)
    assert half.teleport_reports[0].steps


# --- Rows that callbacks write ----------------------------------------------------------------------------------------------


class Writes(TrainerCallback):
    """Rows in the log that have no step, and copies of all rows, those of teleports too."""

    def on_step_end(self, args, state, control, **kwargs):
        state.log_history.append({"mine": 1.0, "loss": 3.0})

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.append(dict(logs))
        state.log_history.append({**logs, "step": state.global_step})


@pytest.mark.parametrize("config", [teleports(steps=[]), EVENT], ids=["off", "on"])
def test_rows_without_a_step(tmp_path, config):
    def trainer(folder):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        return make(tmp_path / folder, config=config, made={"callbacks": [Writes()]}, **saving)

    whole = trainer("whole")
    whole.train()
    for step in (1, 3):
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(flat(resumed.model), flat(whole.model))
    assert len(events_of(whole.state.log_history)) == (0 if config.steps == [] else 1)
    whole.save_state()
    assert write(tmp_path / "whole").exists()
    whole.create_model_card()


def test_a_rate_goes_on_whatever_else_the_log_has():
    event = {"step": 5, "teleport/loss_before": 1.0, "teleport/seconds": 0.1, "teleport/matched_rate": 1.5}
    rows = [{"loss": 1.0}, event, {"teleport/loss_before": 2.0}, {"step": 6, "loss": 1.0}]
    config = TeleportConfig(method="null_space", control="matched_rate", steps=[5])
    assert Plan(config, Course(4, 12, 6, 4, 4), rows).rate_factor == 1.5
    assert Plan(config, Course(4, 12, 8, 4, 4), rows).rate_factor == 1.0, "an epoch later"


# --- One run after another --------------------------------------------------------------------------------------------------


def test_reports_are_those_of_the_last_run(tmp_path):
    trainer = make(tmp_path, config=EVENT, max_steps=3)
    trainer.train()
    first = trainer.teleport_reports
    trainer.train()
    assert len(first) == len(trainer.teleport_reports) == 1
    assert trainer.teleport_reports[0] is not first[0]
    trainer.teleport()
    assert len(trainer.teleport_reports) == 2


class Tight(TeleportTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 2 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_reports_of_a_try_with_too_large_batches_are_not_the_runs(tmp_path):
    trainer = make(tmp_path, config=EVENT, trainer_class=Tight, auto_find_batch_size=True, max_steps=4)
    trainer.train()
    assert_moved(trainer)
    assert len(events_of(trainer.state.log_history)) == 1


def digits_run(folder, kind, **own):
    torch.manual_seed(0)
    model = MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(16, 16), num_labels=10))
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = kind(model, args, train_dataset=load_images("digits")[0].first(40), **own)
    trainer.train()
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_the_files_of_a_run_are_trainers_until_an_event_has_happened(tmp_path):
    plain = digits_run(tmp_path / "plain", Trainer)
    assert digits_run(tmp_path / "as_it_is", TeleportTrainer) == plain
    assert digits_run(tmp_path / "off", TeleportTrainer, teleport_config=TeleportConfig(epochs=0)) == plain
    late = TeleportConfig(method="null_space", steps=[3])
    assert digits_run(tmp_path / "on", TeleportTrainer, teleport_config=late) == sorted([*plain, JOURNAL])
