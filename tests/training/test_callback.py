"""Where a teleport, and the trainer's own callback, stand among the callbacks of a run."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_teleport import TeleportMixin, TeleportTrainer
from hf_teleport.training.callback import TeleportCallback

from tiny_runs import flat, llama, make, teleports


class Note(TrainerCallback):
    """Notes events in a list that several callbacks share, each with the step, and what `see` sees."""

    def __init__(self, name, notes, see=lambda **kwargs: None):
        self.name, self.notes, self.see = name, notes, see


def _noting(event):
    def note(self, args, state, control, **kwargs):
        self.notes.append((event, self.name, state.global_step, self.see(**kwargs)))

    return note


for _event in ("on_train_begin", "on_step_begin", "on_log", "on_pre_optimizer_step", "on_optimizer_step"):
    setattr(Note, _event, _noting(_event))


def run(folder, config=None, see=lambda **kwargs: None, **settings):
    """A trained trainer with a callback that it was given and one that was added later, and their notes."""
    notes = []
    trainer = make(folder, config=config, made={"callbacks": [Note("given", notes, see)]}, **settings)
    trainer.add_callback(Note("added", notes, see))
    trainer.train()
    return trainer, notes


def test_the_trainers_own_callback_stands_between_those_given_and_those_added_later(tmp_path):
    trainer = make(tmp_path, made={"callbacks": [Note("given", [])]})
    trainer.add_callback(Note("added", []))
    names = [getattr(callback, "name", type(callback).__name__) for callback in trainer.callback_handler.callbacks]
    # What turns the model back comes before all that look at it when training ends.
    assert names == ["HomeCallback", "DefaultFlowCallback", "given", "PrinterCallback", "TeleportCallback", "added"]


def test_the_check_comes_after_on_train_begin_of_the_callbacks_given(tmp_path):
    class Freeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.model.layers[0].requires_grad_(False)

    trainer = make(tmp_path, made={"callbacks": [Freeze()]}, max_steps=1, config=teleports(steps=[0], method="null_space"))
    checked = []
    trainer._tell = lambda line, level=0: checked.append(line)
    trainer.train()
    assert "8 of 21 weights" in checked[0], "the other layer's seven, and the head"


def test_a_teleport_comes_between_on_step_begin_and_the_forward_and_logs_when_the_weights_have_moved(tmp_path):
    trainer, notes = run(tmp_path, see=lambda model, **kwargs: flat(model))
    (at,) = trainer.teleport_config.steps
    around = [(event, name) for event, name, step, _ in notes if step == at][:8]
    methods = trainer.teleport_config.method.split("+")
    expected = ["on_log", "on_step_begin", *["on_log"] * len(methods), "on_pre_optimizer_step"]
    assert around == [(event, name) for event in expected for name in ("given", "added")][:8]
    seen = [weights for _, name, step, weights in notes if step == at and name == "given"]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[4])


def test_a_matched_rate_is_seen_by_callbacks_added_later_and_gone_for_them_after_the_step(tmp_path):
    config = teleports("null_space", control="matched_rate")
    trainer, notes = run(tmp_path, config, see=lambda optimizer=None, **kwargs: optimizer.param_groups[0]["lr"])
    (report,) = trainer.teleport_reports
    assert report.matched_rate > 1
    rates = {(event, name): rate for event, name, step, rate in notes if step == 2 and "optimizer_step" in event}
    factor = {key: rate / rates["on_pre_optimizer_step", "given"] for key, rate in rates.items()}
    assert factor["on_pre_optimizer_step", "added"] == factor["on_optimizer_step", "given"] == report.matched_rate
    assert abs(factor["on_optimizer_step", "added"] - 1) < 1e-12
    assert any(isinstance(callback, TeleportCallback) for callback in trainer.callback_handler.callbacks)


class StepsItself:
    """A step of its own, without Trainer's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    "settings", [{"method": "null_space"}, {"method": "basis", "blocking_gains": "hold"}], ids=["null_space", "basis"]
)
def test_events_that_a_step_of_ones_own_leaves_out_are_told_once(tmp_path, caplog, settings):
    def told(*bases):
        caplog.clear()
        tied = llama(tie_word_embeddings=True)  # whose last gain the basis holds
        trainer = make(tmp_path, tied, teleports(**settings, steps=[1, 2]), trainer_class=type("Tried", bases, {}), max_steps=4)
        trainer.train()
        return len(trainer.teleport_reports), caplog.text.count("does not call TeleportMixin's")

    assert told(StepsItself, TeleportTrainer) == (0, 1)
    assert told(TeleportMixin, type("Own", (StepsItself, Trainer), {})) == (2, 0)
