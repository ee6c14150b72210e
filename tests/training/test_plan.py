"""What a plan decides before a run's first step."""

import logging

import pytest
import torch

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.training.plan import Course, Plan

from tiny_models import build, loss_fn


def course(start=0, steps_per_epoch=10, max_steps=40):
    return Course(steps_per_epoch, max_steps, start, 4, 4)


def judged(config, batches, model, course, optimizer=torch.optim.AdamW):
    plan, optimizer = Plan(config, course), optimizer(model.parameters(), lr=1e-3)
    plan.judge(batches, lambda config: Teleporter(model, config, optimizer=optimizer), loss_fn)
    return plan


def test_without_a_run_there_is_no_schedule():
    plan = Plan(TeleportConfig())
    assert (plan.steps, plan.upcoming, plan.due(0)) == ({}, [], False)


def test_an_event_is_due_once_a_step():
    plan = Plan(TeleportConfig(method="null_space", steps=[0, 2]), course())
    assert [plan.due(step) for step in (0, 0, 1, 1, 2, 2, 3)] == [True, False, False, False, True, False, False]


@pytest.mark.parametrize(("start", "upcoming"), [(0, [5, 15]), (5, [5, 15]), (6, [15]), (16, [])])
def test_what_is_still_to_come_of_a_resumed_run(start, upcoming):
    plan = Plan(TeleportConfig(method="null_space", steps=[5, 15]), course(start))
    assert plan.upcoming == upcoming
    assert sorted(plan.steps) == [5, 15]


@pytest.mark.parametrize("start", [0, 3, 6, 15])
def test_what_auto_comes_to_is_the_same_for_a_resumed_run(start):
    model, batch = build("gpt2", torch.float32)
    plan = judged(TeleportConfig(), [batch], model, course(start))
    assert (plan.settings.method, plan.steps) == ("basis", {5: 0, 10: 1, 20: 2})
    assert plan.settled == plan.settings != plan.config
    # Its embeddings are tied: the last norm's gain waits for the last event.
    assert plan.holds(19) == [model.transformer.ln_f.weight] != plan.holds(20) == []


def test_a_batch_whose_loss_is_no_number_is_passed_over():
    model, batch = build("llama", torch.float32)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    plan = judged(TeleportConfig(), [empty, empty, batch], model, course())
    assert plan.settings.method == "basis"
    assert not [line for level, line in plan.notes if level == logging.WARNING and "skipped" in line]
    hopeless = judged(TeleportConfig(method="null_space"), [empty, empty], model, course())
    assert "the loss on a teleport batch is nan" in hopeless.notes[-1][1]


def test_nothing_to_judge_by():
    model, _ = build("llama", torch.float32)
    with pytest.raises(ValueError, match="the data set to teleport on is empty"):
        judged(TeleportConfig(), [], model, course())


def test_giving_up_is_said():
    plan = Plan(TeleportConfig(method="null_space"), course())
    plan.give_up("No teleports: for a reason.")
    assert (plan.upcoming, plan.notes) == ([], [(logging.WARNING, "No teleports: for a reason.")])


@pytest.mark.parametrize("method", ["auto", "null_space"])
def test_an_optimizer_that_cannot_be_rehearsed(method):
    packages = pytest.importorskip("pytorch_optimizer")
    model, batch = build("llama", torch.float32)

    def lookahead(parameters, lr):
        return packages.Lookahead(torch.optim.AdamW(parameters, lr=lr))

    extra = {"rehearsal_steps": 2} if method == "null_space" else {"budget": None}
    config = TeleportConfig(method=method, **extra)
    if method == "null_space":
        with pytest.raises(ValueError, match=r"Lookahead steps weights by an optimizer inside it \(AdamW\).*rehearsal_steps=0"):
            judged(config, [batch], model, course(), lookahead)
        return
    plan = judged(config, [batch], model, course(), lookahead)
    assert not plan.upcoming
    assert [line for _, line in plan.notes if "no teleports, because Lookahead steps weights by an optimizer inside it" in line]
