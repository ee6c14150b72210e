"""Runs whose basis follows training: several events, chosen from the gradients of ordinary steps."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_teleport import TeleportConfig, TeleportTrainer
from hf_teleport.methods.basis.moments import Moments
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.training.plan import TRACKED

from tiny_models import loss_fn
from tiny_runs import Texts, arguments, llama, pad

STEPS = 16


def run(folder, config, model=None, callbacks=(), rows=64, trainer_class=TeleportTrainer, **settings):
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_strategy": "no", **settings}
    return trainer_class(
        model or llama(),
        arguments(folder, **given),
        train_dataset=Texts(rows),
        data_collator=pad,
        teleport_config=config,
        callbacks=list(callbacks),
    )


def following(steps=(2, 4, 8), **settings):
    return TeleportConfig(**{"method": "basis", "steps": list(steps), "track_every": 1, **settings})


def ends(trainer):
    state = trainer.optimizer.optimizer.state
    kept = [v for p in trainer.model.parameters() for v in state[p].values() if isinstance(v, torch.Tensor)]
    return [p.detach().clone() for p in trainer.model.parameters()] + kept


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_by_default_a_basis_follows_training(tmp_path):
    trainer = run(tmp_path, TeleportConfig(method="basis"), rows=200, max_steps=45)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "teleport/misalignment" in entry]
    assert steps == [10, 20]
    for report in trainer.teleport_reports:
        assert report.stopped_because == "steps_done"
        assert report.misalignment_after < 1e-3 < report.misalignment
        assert report.angle > 0


def test_an_event_looks_at_one_batch_once_training_was_looked_at(tmp_path):
    taken = []

    class Counting(TeleportTrainer):
        def _draw(self, count, event):
            taken.append((event, count))
            return super()._draw(count, event)

    config = following(steps=(0, 4), num_batches=3)
    run(tmp_path, config, trainer_class=Counting).train()
    # One to find out what can turn before the run begins; three where nothing was seen yet.
    assert taken == [(0, 1), (0, 3), (4, 1)]


@pytest.mark.parametrize("decay", [0.8, 0.5])
def test_moments_are_those_of_the_steps_that_were_looked_at(tmp_path, decay):
    """Whatever a run saves can be computed from the gradients of its steps."""
    seen = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step in (0, 3, 6):
                seen.append((copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]))

    # The one event is never reached: the run is stopped before.
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    config = following(steps=(12,), track_every=3, track_decay=decay)
    trainer = run(tmp_path, config, callbacks=[Gradients(), Stop()], save_strategy="steps", save_steps=8, max_grad_norm=0.1)
    trainer.train()
    saved = load_file(Path(tmp_path, "checkpoint-8", TRACKED))
    assert int(saved.pop("looks")) == 3
    totals = {}
    for model, gradients in seen:
        batch = pad([Texts(64)[i] for i in range(4)])
        symmetries, _ = find_symmetries(model.eval(), loss_fn, batch)
        used = [s for s in symmetries if not s.reason and s.kind != "scaling"]
        moments = Moments(used)
        moments.look(dict(zip(model.parameters(), gradients, strict=True)))
        for symmetry, value in moments.values.items():
            name = f"{symmetry.kind}/{symmetry.name}/{symmetry.blocks}x{symmetry.size}"
            totals[name] = decay * totals.get(name, 0) + value
    assert set(saved) == set(totals)
    for name, value in saved.items():
        torch.testing.assert_close(value, totals[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_resumed_anywhere_ends_as_the_whole_one(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "rows": 64 * accumulation}
    whole = run(tmp_path / "whole", following(), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    for checkpoint in sorted(Path(tmp_path, "whole").glob("checkpoint-*")):
        resumed = run(tmp_path / "resumed", following(), **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same(ends(resumed), ends(whole)), checkpoint.name


def test_what_was_gathered_decides_so_a_checkpoint_without_it_ends_elsewhere(tmp_path):
    whole = run(tmp_path / "whole", following(steps=(8,)), save_strategy="steps", save_steps=6)
    whole.train()
    Path(tmp_path, "whole", "checkpoint-6", TRACKED).unlink()
    resumed = run(tmp_path / "resumed", following(steps=(8,)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert not same(ends(resumed), ends(whole))


def test_without_an_event_nothing_is_gathered_and_training_is_trainers(tmp_path):
    off = run(tmp_path / "off", following(steps=(), epochs=0), save_strategy="steps", save_steps=8)
    off.train()
    assert not Path(tmp_path, "off", "checkpoint-8", TRACKED).exists()
    plain = Trainer(llama(), off.args, train_dataset=Texts(64), data_collator=pad)
    plain.train()
    assert same(ends(off), ends(plain))


def test_looking_changes_nothing(tmp_path):
    """Until the first event a run that looks is the run that does not."""
    ended = []
    for every in (0, 1):
        stopped = {}

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, stopped=stopped, **kwargs):
                if state.global_step == 8:
                    stopped["weights"] = [p.detach().clone() for p in model.parameters()]

        run(tmp_path, following(steps=(8,), track_every=every), callbacks=[Stop()]).train()
        ended.append(stopped["weights"])
    assert same(*ended)


@pytest.mark.parametrize("second_moment", ["factors", "measure", "turn", "keep"])
def test_outputs_stay_through_a_schedule_of_events(tmp_path, second_moment):
    """With a learning rate of zero, only events change the weights."""
    model = llama().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    batch = pad([Texts(64)[i] for i in range(8)])
    before = model(**batch).logits.detach().clone()
    weights = [p.detach().clone() for p in model.parameters()]
    config = following(steps=range(1, 11), second_moment=second_moment)
    trainer = run(tmp_path, config, model, learning_rate=0.0, lr_scheduler_type="constant")
    trainer.train()
    assert [report.stopped_because for report in trainer.teleport_reports] == ["steps_done"] * 10
    assert not same(weights, [p.detach() for p in model.parameters()])
    # Norms are computed in float32 whatever the weights are.
    torch.testing.assert_close(trainer.model.eval()(**batch).logits, before, atol=1e-5, rtol=1e-5)


def test_gains_of_a_tied_model_wait_for_the_last_event(tmp_path):
    gains = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            gains[state.global_step] = model.model.norm.weight.detach().clone()

    config = following(steps=(2, 6), blocking_gains="hold")
    trainer = run(tmp_path, config, llama(tie_word_embeddings=True), callbacks=[Watch()])
    trainer.train()
    for report in trainer.teleport_reports:
        assert "stream" in {s.kind for s in report.symmetries if not s.reason}
    assert all(torch.equal(gains[step], gains[1]) for step in range(1, 7))
    assert not torch.equal(gains[8], gains[1])


def test_weights_in_bfloat16_follow_too(tmp_path):
    trainer = run(tmp_path, following(), llama().to(torch.bfloat16))
    trainer.train()
    assert [report.stopped_because for report in trainer.teleport_reports] == ["steps_done"] * 3
    assert all(report.misalignment_after < 0.05 for report in trainer.teleport_reports)
