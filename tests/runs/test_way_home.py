"""Runs that end in the coordinates in which they began."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.cli import main
from hf_teleport.layers.double import KeepDouble
from hf_teleport.training.plan import TRACKED

from tiny_runs import Texts, llama, make, pad


def batch():
    return pad([Texts(64)[i] for i in range(8)])


def following(**settings):
    return TeleportConfig(**{"method": "basis", "steps": [2, 4, 8], "track_every": 1, **settings})


def run(folder, model, config=None, callbacks=(), trainer_class=TeleportTrainer, **settings):
    given = {"max_steps": 12, "learning_rate": 3e-3, "save_strategy": "no", **settings}
    made = {"train_dataset": Texts(64), "eval_dataset": Texts(9, seed=1), "callbacks": list(callbacks)}
    return make(folder, model, config or following(), trainer_class, made=made, **given)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def near(one, other, tolerance=1e-6):
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(one, other, strict=True))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved model, its gains uneven."""
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder):
    return tf.LlamaForCausalLM.from_pretrained(folder)


def logits(model, dtype=None):
    with torch.no_grad(), KeepDouble():
        return model.eval()(**batch()).logits


def test_a_run_from_saved_weights_ends_in_their_coordinates(saved, tmp_path):
    model = loaded(saved)
    before = weights(model)
    trainer = run(tmp_path / "out", model, learning_rate=0.0)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = weights(model)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen["end"] = weights(model)

    trainer.add_callback(Watch())
    trainer.train()
    assert [report.stopped_because for report in trainer.teleport_reports] == ["steps_done"] * 3
    assert not near(before, seen[12], 1e-2)
    assert near(before, weights(model))
    assert same(seen["end"], weights(model))  # other callbacks upload what the run ends with
    trainer.save_model()
    assert not Path(trainer.args.output_dir, TRACKED).exists()


@pytest.mark.parametrize(("turn_back", "ends_home"), [("auto", False), ("never", False), ("end", True)])
def test_a_new_model_stays_turned_unless_it_is_asked_for(tmp_path, turn_back, ends_home):
    model = llama()
    before = weights(model)
    run(tmp_path, model, following(turn_back=turn_back), learning_rate=0.0).train()
    assert near(before, weights(model)) == ends_home


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_stay_when_a_trained_model_is_turned_back(saved, tmp_path, dtype, tolerance):
    trainer = run(tmp_path / "out", loaded(saved).to(dtype), following(turn_back="never"))
    trainer.train()
    before = logits(trainer.model)
    found = trainer.turn_back()
    assert {symmetry.kind for symmetry in found} == {"stream", "value_output"}
    torch.testing.assert_close(logits(trainer.model), before, atol=tolerance, rtol=tolerance)
    assert trainer.turn_back() == []


def test_a_run_turned_back_in_its_midst_goes_on_and_can_be_resumed(saved, tmp_path):
    class Home(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                self.trainer.turn_back()

    def train(folder, checkpoint=None, **settings):
        home = Home()
        home.trainer = run(folder, loaded(saved), callbacks=[home], save_strategy="steps", save_steps=3, **settings)
        home.trainer.train(resume_from_checkpoint=checkpoint)
        return home.trainer

    whole = train(tmp_path / "whole")
    assert [report.stopped_because for report in whole.teleport_reports] == ["steps_done"] * 3
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for step in (3, 6, 9):
        resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(weights(resumed.model), weights(whole.model)), step


def test_the_best_checkpoint_is_turned_back_by_its_own_way(saved, tmp_path):
    model = loaded(saved)
    before = weights(model)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3, "save_only_model": True}

    class First(TeleportTrainer):
        def _determine_best_metric(self, metrics, trial):
            return super()._determine_best_metric({**metrics, "eval_loss": float(self.state.global_step)}, trial)

    trainer = run(tmp_path / "out", model, trainer_class=First, learning_rate=0.0, load_best_model_at_end=True, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert near(before, weights(model))


def test_a_saved_model_that_is_turned_is_turned_back_by_the_command(saved, tmp_path, capsys):
    trainer = run(tmp_path / "out", loaded(saved), following(turn_back="never"), save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    turned, config = loaded(folder), json.loads((folder / "config.json").read_text())
    trainer.turn_back()
    assert main(["turn-back", str(folder), "--output", str(tmp_path / "home")]) == 0
    assert "stream of model.embed_tokens, 1 x 32: turned back" in capsys.readouterr().out
    home = loaded(tmp_path / "home")
    assert same(weights(home), weights(trainer.model))
    assert not (tmp_path / "home" / TRACKED).exists()
    torch.testing.assert_close(logits(home), logits(turned), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "home" / "config.json").read_text()) == config
    assert not (tmp_path / "home" / "teleports.json").exists()
    assert main(["turn-back", str(folder / "checkpoint-10")]) == 0
    assert loaded(folder / "checkpoint-10" / "turned_back") is not None
    for wrong, message in ((tmp_path / "home", "nothing to turn back"), (tmp_path / "nowhere", "nothing to turn back")):
        assert main(["turn-back", str(wrong)]) == 2
        assert message in capsys.readouterr().err
    assert main(["turn-back", str(folder), "--output", str(folder)]) == 2


def test_the_command_turns_an_adapter_back_that_was_saved_in_mid_run(saved, tmp_path, capsys):
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(saved), peft.LoraConfig(r=4, target_modules="all-linear"))
    trainer = run(tmp_path / "out", model, following(turn_back="end"), save_strategy="steps", save_steps=12)
    trainer.train()
    assert main(["turn-back", str(tmp_path / "out" / "checkpoint-12"), "--output", str(tmp_path / "home")]) == 0
    assert "turned back" in capsys.readouterr().out
    home, turned = (
        peft.PeftModel.from_pretrained(loaded(saved), folder)
        for folder in (tmp_path / "home", tmp_path / "out" / "checkpoint-12")
    )
    assert near(weights(home), weights(model))
    assert not near(weights(turned), weights(model), 1e-3)
    config = tmp_path / "home" / "adapter_config.json"
    shutil.copy(tmp_path / "out" / "checkpoint-12" / TRACKED, tmp_path / "home")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert main(["turn-back", str(tmp_path / "home")]) == 2
    assert "names no base model: write its folder" in capsys.readouterr().err


def test_the_command_says_why_a_file_is_of_no_use(saved, tmp_path, capsys):
    out = tmp_path / "out"
    run(out, loaded(saved), following(turn_back="never", steps=[4]), save_strategy="steps", save_steps=3).train()
    wrong = {
        "checkpoint-3": "saved before the first change of basis, or turned back already, so there is nothing",
        "checkpoint-6": "is cut short or broken",
    }
    base = peft.get_peft_model(loaded(saved), peft.LoraConfig(r=4, target_modules="all-linear"))
    run(out / "lora", base, following(frozen_weights="turn"), save_strategy="steps", save_steps=6).train()
    wrong["lora/checkpoint-6"] = "turned back already, so there is nothing"
    (out / "checkpoint-6" / TRACKED).write_bytes((out / "checkpoint-12" / TRACKED).read_bytes()[:-9])
    llama(hidden_size=16).save_pretrained(out / "other")
    shutil.copy(out / "checkpoint-12" / TRACKED, out / "other")
    wrong["other"] = "turns were made in another model: model.layers.0.self_attn.q_proj.weight has the shape [16, 16] here"
    for name, message in wrong.items():
        assert main(["turn-back", str(out / name)]) == 2
        assert message in capsys.readouterr().err


def test_the_command_keeps_the_way_of_what_stays_turned(tmp_path, capsys):
    model = llama(tie_word_embeddings=True)
    trainer = run(
        tmp_path / "out", model, following(turn_back="never", blocking_gains="hold"), save_strategy="steps", save_steps=12
    )
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-12"
    home = tmp_path / "home"
    assert main(["turn-back", str(folder), "--output", str(home)]) == 0
    out = capsys.readouterr().out  # the last norm's gain is trained after the last event
    assert "stream of model.embed_tokens, 1 x 32: stays turned" in out
    assert "value_output of model.layers.0.self_attn.v_proj, 2 x 16: turned back" in out
    assert main(["turn-back", str(home)]) == 0
    out = capsys.readouterr().out
    assert "stream" in out
    assert "value_output" not in out


def test_a_loop_goes_on_from_what_the_teleporter_saves(saved, tmp_path):
    def event(teleporter):
        return teleporter.teleport([batch()], lambda model, batch: model(**batch).loss)

    first, second = (Teleporter(loaded(saved).double(), TeleportConfig(method="basis")) for _ in range(2))
    before = weights(first.model)
    event(first)
    second.model.load_state_dict(first.model.state_dict())
    for teleporter in (first, second):
        accelerator = Accelerator(cpu=True)
        accelerator.register_for_checkpointing(teleporter)
        if teleporter is first:
            accelerator.save_state(str(tmp_path / "state"))
    accelerator.load_state(str(tmp_path / "state"))
    event(second)
    assert not near(before, weights(second.model), 1e-3)
    assert len(second.turn_back()) == len(first.turn_back()) > 0
    assert near(before, weights(second.model), 1e-12)


def test_what_a_teleporter_saves_is_of_its_model(saved):
    teleporter = Teleporter(loaded(saved), TeleportConfig(method="basis"))
    teleporter.teleport([batch()], lambda model, batch: model(**batch).loss)
    with pytest.raises(ValueError, match="turns were made in another model"):
        Teleporter(llama(hidden_size=16)).load_state_dict(teleporter.state_dict())


def test_what_lies_beside_saved_weights_is_about_them(saved, tmp_path):
    """A run that is saved turned, and again turned back."""
    trainer = run(tmp_path / "out", loaded(saved), following(turn_back="never"))
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / TRACKED).exists()
    trainer.turn_back()
    trainer.save_model()
    assert not (tmp_path / "out" / TRACKED).exists()


def test_a_second_run_of_the_same_trainer_still_knows_the_way(saved, tmp_path):
    model = loaded(saved)
    before = weights(model)
    trainer = run(tmp_path / "out", model, following(turn_back="never"), learning_rate=0.0)
    trainer.train()
    trainer.teleport_config = following(turn_back="end", steps=[3])
    trainer.train()
    assert near(before, weights(model))


def test_gains_that_would_stop_the_way_home_are_held_to_the_end(tmp_path):
    for turn_back in ("end", "never"):
        model = llama(tie_word_embeddings=True)
        first = model.model.norm.weight.detach().clone()
        config = following(turn_back=turn_back, blocking_gains="hold")
        trainer = run(tmp_path / turn_back, model, config)
        trainer.train()
        assert torch.equal(model.model.norm.weight, first) == (turn_back == "end")
        stays = [symmetry.reason for symmetry in trainer.turn_back()]
        assert any("uneven" in reason for reason in stays) == (turn_back == "never")


def test_base_plus_the_change_of_two_runs(saved, tmp_path):
    """Task arithmetic: without training each change is zero, and with it the sum computes what the sum of changes is."""
    base = loaded(saved)
    changes = []
    for seed in (0, 1):
        model = loaded(saved)
        run(tmp_path / str(seed), model, seed=seed, learning_rate=1e-4).train()
        changes.append([a - b for a, b in zip(weights(model), weights(base), strict=True)])
        plain = loaded(saved)
        run(tmp_path / f"plain{seed}", plain, following(steps=[], epochs=0), seed=seed, learning_rate=1e-4).train()
        moved = [a - b for a, b in zip(weights(plain), weights(base), strict=True)]
        # Both runs have moved a little way from the base, so the sum is near it; in turned coordinates it would be far.
        own, usual = (torch.cat([c.flatten() for c in each]).norm() for each in (changes[-1], moved))
        assert own < 3 * usual
    merged = loaded(saved)
    with torch.no_grad():
        for parameter, one, two in zip(merged.parameters(), *changes, strict=True):
            parameter.add_(0.5 * (one + two))
    loss = {name: m.eval()(**batch()).loss.item() for name, m in (("base", base), ("merged", merged))}
    assert loss["merged"] < loss["base"]


def test_a_teleporter_of_a_loop_turns_back(saved):
    model = loaded(saved).double()
    before = weights(model)
    teleporter = Teleporter(model, TeleportConfig(method="basis"))
    for _ in range(2):
        teleporter.teleport([batch()], lambda model, batch: model(**batch).loss)
    assert not near(before, weights(model), 1e-3)
    assert {report.kind for report in teleporter.turn_back()} == {"stream", "value_output"}
    assert near(before, weights(model), 1e-12)
