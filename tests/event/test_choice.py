"""Method 'auto', the default: what it comes to, and what it leaves alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.event.choice import BASIS_STEP, afford
from hf_teleport.event.cost import event_passes
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification

from tiny_models import build, loss_fn


def mlp():
    torch.manual_seed(0)
    return MLPForImageClassification(MLPConfig(image_size=4, num_channels=1, hidden_sizes=[32, 32], num_labels=4))


def rows(count=32):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 4, 4, generator=generator), "labels": i % 4} for i in range(count)]


def chosen(model, batch, optimizer=None, **settings):
    teleporter = Teleporter(model, TeleportConfig(**settings), optimizer=optimizer)
    return teleporter.choose(batch, loss_fn)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_a_transformer_with_adamw_gets_a_basis_after_its_first_steps(name):
    model, batch = build(name)
    config, why = chosen(model, batch, torch.optim.AdamW(model.parameters()))
    assert (config.method, config.warmup_steps, why) == ("basis", BASIS_STEP, "")
    assert config.blocking_gains == "hold"
    config, _ = chosen(model, batch, torch.optim.AdamW(model.parameters()), warmup_steps=50)
    assert config.warmup_steps == 50


def test_an_optimizer_that_sees_no_basis():
    model, batch = build("llama")
    config, why = chosen(model, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (config.method, config.objective, config.rehearsal_steps) == ("null_space", "lookahead", 8)
    assert "SGD" in why


def test_a_model_without_features_to_turn():
    model = mlp()
    batch = {"pixel_values": torch.randn(4, 1, 4, 4), "labels": torch.arange(4)}
    config, why = chosen(model, batch, torch.optim.AdamW(model.parameters()), rehearsal_steps=3)
    assert (config.method, config.objective, config.rehearsal_steps) == ("null_space", "lookahead", 3)
    assert "no features" in why


def test_what_was_set_by_hand_stays():
    model, batch = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config, _ = chosen(model, batch, optimizer)
    assert (config.objective, config.energy_threshold) == ("lookahead", None)
    config, _ = chosen(model, batch, optimizer, objective="sharpness", energy_threshold=0.999)
    assert (config.objective, config.energy_threshold) == ("sharpness", 0.999)
    config, _ = chosen(model, batch, optimizer, scope="batch")
    assert config.energy_threshold == 1


def test_without_an_optimizer_it_is_the_papers_method():
    model, batch = build("llama")
    assert chosen(model, batch)[0] == TeleportConfig(method="null_space")
    report = Teleporter(model, TeleportConfig()).teleport([batch], loss_fn)
    assert report.method == "null_space"
    assert report.grad_norm_after > report.grad_norm_before


@given(
    batches=st.integers(1, 32),
    steps=st.integers(1, 16),
    events=st.integers(1, 5),
    passes=st.integers(1, 100_000),
    rehearsal_steps=st.integers(0, 16),
)
def test_what_is_afforded_is_within_the_budget(batches, steps, events, passes, rehearsal_steps):
    common = {"method": "null_space", "objective": "lookahead", "rehearsal_steps": rehearsal_steps}
    config = TeleportConfig(num_batches=batches, steps_per_batch=steps, **common)
    cut = afford(config, 0.05, events, passes)
    if cut is None:
        smallest = TeleportConfig(num_batches=1, steps_per_batch=min(2, steps), **common)
        assert events * event_passes(smallest) > 0.05 * passes or steps == 1
    else:
        assert events * event_passes(cut) <= 0.05 * passes
        assert cut.num_batches <= batches
        assert cut.steps_per_batch <= steps
        if events * event_passes(config) <= 0.05 * passes:
            assert cut == config


def test_neither_a_basis_nor_a_run_without_a_budget_is_cut():
    for method, budget in (("basis", 0.05), ("null_space", None)):
        config = TeleportConfig(method=method)
        assert afford(config, budget, 5, 1) is config


def train(tmp_path, model, trainer_class=TeleportTrainer, resume=None, teleport_config=None, **settings):
    arguments = {"output_dir": str(tmp_path), "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments |= {"disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 2, "seed": 0}
    own = {} if teleport_config is None else {"teleport_config": teleport_config}
    trainer = trainer_class(model, TrainingArguments(**arguments | settings), train_dataset=rows(), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_too_short_for_it_is_plain_training(tmp_path, caplog):
    config = TeleportConfig()
    trainer = train(tmp_path / "auto", mlp(), teleport_config=config, optim="sgd")  # a warning, with bars and without
    assert not trainer.teleport_reports
    assert "no features to turn" in caplog.text or "SGD" in caplog.text
    assert "teleport_budget" in caplog.text
    plain = train(tmp_path / "plain", mlp(), Trainer, optim="sgd")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_name_that_matches_nothing_is_said_even_if_no_teleport_can_be_paid_for(tmp_path, optim):
    with pytest.raises(ValueError, match=r"'layers\.9' matches no layer"):
        train(tmp_path, mlp(), teleport_config=TeleportConfig(target_modules=["layers.9"]), optim=optim)


def test_a_model_in_which_nothing_may_move_trains_on(tmp_path, caplog):
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    trainer = train(tmp_path, model, teleport_config=TeleportConfig(budget=None))
    assert (trainer.state.global_step, trainer.teleport_reports) == (16, [])
    assert "no teleports, because no weight of the model can be teleported" in caplog.text


def test_with_a_budget_it_teleports_and_resumes_to_the_same(tmp_path):
    config = TeleportConfig(budget=None, epochs=2, num_batches=2, steps_per_batch=2)
    whole = train(tmp_path / "whole", mlp(), teleport_config=config, learning_rate=0.1, optim="sgd")
    assert [report.method for report in whole.teleport_reports] == ["null_space", "null_space"]
    assert all(report.rolled_back == (report.stopped_because == "no_better") for report in whole.teleport_reports)
    again = train(
        tmp_path / "again",
        mlp(),
        teleport_config=config,
        resume=str(tmp_path / "whole" / "checkpoint-6"),
        learning_rate=0.1,
        optim="sgd",
    )
    assert len(again.teleport_reports) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def turned(folder, resume=None, **settings):
    """A run of a model that method 'auto' gives another basis."""
    model, batch = build("gpt2")
    data = [{key: value[i % 3] for key, value in batch.items()} for i in range(32)]
    settings |= {"num_train_epochs": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **settings, use_cpu=True)
    trainer = TeleportTrainer(model, arguments, train_dataset=data, teleport_config=TeleportConfig())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("max_steps", "step"), [(-1, 4), (4, 2), (1, 0)])
def test_a_basis_is_turned_early_in_a_short_run(tmp_path, max_steps, step):
    trainer = turned(tmp_path, max_steps=max_steps)
    assert [report.method for report in trainer.teleport_reports] == ["basis"]
    assert trainer._plan.steps == {step: 0}
    # Its embeddings are tied: the gain that blocks the stream was held, so that the stream has turned.
    assert "stream" in {symmetry.kind for symmetry in trainer.teleport_reports[0].symmetries if not symmetry.reason}


def test_a_run_resumed_before_its_basis_is_turned_ends_as_the_whole_one(tmp_path):
    whole = turned(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    for start, reports in ((1, 1), (2, 1), (3, 0)):
        resumed = turned(tmp_path, str(tmp_path / f"checkpoint-{start}"), max_steps=4)
        assert len(resumed.teleport_reports) == reports
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_check_is_of_what_it_comes_to():
    model, batch = build("llama")
    for optimizer, method in ((None, "null_space"), (torch.optim.AdamW(model.parameters()), "basis")):
        teleporter = Teleporter(model, TeleportConfig(), optimizer=optimizer)
        check = teleporter.check(batch, loss_fn)
        assert teleporter.config.method == method
        assert bool(check.symmetries) == (method == "basis")
