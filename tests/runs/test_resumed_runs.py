"""One run after another: resumed from a checkpoint, begun anew, gone on with."""

import pytest
import torch

from tiny_runs import (
    Stream,
    assert_moved,
    flat,
    gpt2,
    llama,
    make,
    moved,
    teleports,
)


def frozen():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    return model


RUNS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "activation_checkpointing": {"activation_checkpointing": True},
    "bf16": {"bf16": True},
    "grouped_by_length": {"train_sampling_strategy": "group_by_length"},
    "frozen": {"model": frozen},
    "stream": {"made": {"train_dataset": Stream()}},
    "compiled": {"torch_compile_backend": "eager"},
    "all_at_once": {
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": True,
        "bf16": True,
        "torch_compile_backend": "eager",
    },
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, settings):
    def run(folder):
        others = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **settings}
        return make(tmp_path / folder, others.pop("model", llama)(), teleports(steps=[3]), **others)

    whole = moved(run("whole"))
    for step, reports in ((2, 2), (4, 0)):
        resumed = run("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(resumed.teleport_reports) == reports
        assert torch.equal(flat(resumed.model), flat(whole.model))


@pytest.mark.parametrize(("gains", "event", "step"), [("hold", 2, 4), ("leave", 4, 2)], ids=["past", "blocked"])
def test_resumed_where_nothing_may_move_any_more(tmp_path, gains, event, step):
    def run(folder):
        config = teleports("basis", steps=[event], symmetries=["stream"], blocking_gains=gains)
        return make(tmp_path / folder, gpt2(), config, max_steps=6, save_strategy="steps", save_steps=2)

    whole = run("whole")
    whole.train()
    assert [report.steps for report in whole.teleport_reports] == [1 if gains == "hold" else 0]
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_each_training_of_a_model_init_starts_anew(tmp_path):
    run = make(tmp_path, made={"model_init": lambda: llama()})
    first = flat(moved(run).model)
    run.train()
    assert_moved(run)
    assert torch.equal(flat(run.model), first)


def test_teleports_by_hand_between_two_trainings(tmp_path):
    run = moved(make(tmp_path))
    before, loss = flat(run.model), run.evaluate()["eval_loss"]
    assert run.teleport().method == "basis"
    assert not torch.equal(flat(run.model), before)
    assert run.evaluate()["eval_loss"] == pytest.approx(loss, rel=0.05)
    run.train()
    assert_moved(run)
