"""What a sceptic would try instead of a teleport: a random move of the same length, and a learning rate that makes up for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)).double()
    return model, [(torch.randn(6, 12, dtype=torch.float64), torch.arange(6) % 4) for _ in range(2)]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def moves(**settings):
    """The report of an event, and how far each parameter moved."""
    model, batches = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = Teleporter(model, TeleportConfig(method="null_space", **settings)).teleport(batches, cross_entropy)
    return report, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_a_random_move_is_as_long_and_keeps_the_loss():
    _, teleported = moves()
    report, moved = moves(control="random_move")
    again = moves(control="random_move")[1]
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-12)
    assert not report.rolled_back
    for layer in ("2", "4"):
        lengths = [
            torch.cat([part[f"{layer}.weight"], part[f"{layer}.bias"][:, None]], 1).flatten() for part in (teleported, moved)
        ]
        assert lengths[0].norm() == pytest.approx(float(lengths[1].norm()), rel=1e-12)
        assert abs(F.cosine_similarity(*lengths, dim=0)) < 0.3
    # The first layer has no direction, so nothing of the same length.
    assert not any(part["0.weight"].any() for part in (teleported, moved))
    assert all(torch.equal(moved[name], again[name]) for name in moved)


def test_a_matched_rate_moves_nothing_and_tells_the_growth():
    plain, _ = moves()
    report, moved = moves(control="matched_rate")
    assert not any(part.any() for part in moved.values())
    assert (report.rolled_back, report.stopped_because) == (True, "matched_rate")
    assert report.matched_rate == pytest.approx(plain.grad_norm_after / plain.grad_norm_before)
    assert report.matched_rate > 1.2
    assert plain.matched_rate == 1


@pytest.mark.parametrize("settings", [{"method": "basis"}, {"method": "level_set"}, {"method": "null_space", "scope": "batch"}])
def test_controls_are_of_one_null_space(settings):
    with pytest.raises(ValueError, match="control = 'random_move'"):
        TeleportConfig(control="random_move", **settings)


class Rates(TrainerCallback):
    """The learning rate of each optimizer step, as the optimizer sees it."""

    def __init__(self):
        self.rates = []
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


def rates_of_a_run(tmp_path, data, trainer_class=TeleportTrainer, resume=None, **settings):
    torch.manual_seed(0)
    arguments = {"output_dir": str(tmp_path), "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments |= {"disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "linear", "learning_rate": 0.1, "optim": "sgd"}
    arguments |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    trainer = trainer_class(
        MLPForImageClassification(MLPConfig(image_size=4, num_channels=1, hidden_sizes=[32, 32], num_labels=4)),
        TrainingArguments(**arguments),
        train_dataset=data,
        **settings,
    )
    rates = Rates()
    rates.trainer = trainer
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, rates.rates


def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 4, 4, generator=generator), "labels": i % 4} for i in range(16)]


def test_the_rate_is_multiplied_until_the_next_epoch_also_after_a_resume(tmp_path):
    data = rows()
    _, plain = rates_of_a_run(tmp_path / "plain", data, Trainer)
    config = TeleportConfig(method="null_space", epochs=1, num_batches=2, control="matched_rate")
    trainer, rates = rates_of_a_run(tmp_path / "whole", data, teleport_config=config)
    growth = trainer.teleport_reports[0].matched_rate
    assert growth > 1.05
    expected = [rate * growth if step < 4 else rate for step, rate in enumerate(plain)]
    assert rates == pytest.approx(expected)
    resumed, tail = rates_of_a_run(
        tmp_path / "again", data, resume=str(tmp_path / "whole" / "checkpoint-2"), teleport_config=config
    )
    assert not resumed.teleport_reports
    assert tail == pytest.approx(expected[2:])
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
