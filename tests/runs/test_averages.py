"""Averages of weights across events: turned along, or refused with the way out."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from trl import BEMACallback
from trl.trainer.callbacks import SyncRefModelCallback

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer

from tiny_runs import Texts, arguments, llama, pad


def batch():
    return pad([Texts(32)[i] for i in range(8)])


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


class Averaging(TrainerCallback):
    """An average kept by a callback, as users write it."""

    def __init__(self, average):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def run(folder, model, config, callbacks=(), trainer_class=TeleportTrainer, eval_dataset=None, **settings):
    given = {"max_steps": 8, "learning_rate": 1e-3, **settings}
    return trainer_class(
        model,
        arguments(folder, **given),
        train_dataset=Texts(64),
        eval_dataset=eval_dataset,
        data_collator=pad,
        teleport_config=config,
        callbacks=list(callbacks),
    )


def following(**settings):
    return TeleportConfig(**{"method": "basis", "steps": [2, 5], "track_every": 1, **settings})


def uneven():
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return model


def ema(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("turn_back", ["never", "end"])
def test_an_average_across_events_is_near_the_model_and_without_its_turn_it_is_not(tmp_path, turn_back):
    """The loss of a running average is near the model's. A mixture of two bases is as bad as a new model."""
    losses = {}
    for found in (True, False):
        model = uneven()
        kept = ema(model)
        average = Averaging(kept)
        if not found:  # hidden where nobody looks
            average.average = None
            average.on_step_end = lambda *args, own=kept, model=None, **kwargs: own.update_parameters(model)
        trainer = run(tmp_path, model, following(turn_back=turn_back, basis="random"), [average], max_steps=7)
        trainer.train()
        assert all(report.stopped_because == "steps_done" for report in trainer.teleport_reports)
        with torch.no_grad():
            losses[found] = [m.eval()(**batch()).loss.item() for m in (model, kept.module)]
    assert losses[True][1] == pytest.approx(losses[True][0], abs=0.1)
    assert abs(losses[False][1] - losses[False][0]) > abs(losses[True][1] - losses[True][0]) + 0.02


def test_with_a_learning_rate_of_zero_an_average_is_the_model_at_each_step(tmp_path):
    model = uneven()
    before = [p.detach().clone() for p in model.parameters()]
    average, off = Averaging(ema(model)), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            pairs = zip(model.parameters(), average.average.module.parameters(), strict=True)
            off.append(max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs))

    run(tmp_path, model, following(turn_back="end"), [average, Look()], learning_rate=0.0).train()
    assert len(off) == 8
    assert max(off) < 2e-6
    for a, b in zip(before, average.average.module.parameters(), strict=True):
        torch.testing.assert_close(b.data, a, atol=2e-6, rtol=0)


def other(model):
    """The same architecture at other weights: an average's gains are not the model's."""
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return average


def test_what_an_average_computes_stays_in_events_and_on_the_way_home():
    model = uneven().double()
    averages = [other(model), dict(other(model).named_parameters()), AveragedModel(other(model))]
    plain = copy.deepcopy(averages[1])
    names = {name: tensor.detach().clone() for name, tensor in plain.items()}
    averages[1] = names  # tensors that are no parameters
    first = [p.detach().clone() for p in averages[0].parameters()]

    def computed():
        second = copy.deepcopy(model)
        second.load_state_dict(names, strict=False)
        return [logits(average) for average in (averages[0], second, averages[2].module)]

    before = computed()
    teleporter = Teleporter(model, TeleportConfig(method="basis", basis="random"))
    teleporter.register_average(*averages)
    for seed in range(2):
        teleporter.config = TeleportConfig(method="basis", basis="random", seed=seed)
        assert teleporter.teleport([batch()], lambda model, batch: model(**batch).loss).steps
    moved = [p.detach().clone() for p in averages[0].parameters()]
    assert not any(torch.allclose(a, b) for a, b in zip(first, moved, strict=True))
    for a, b in zip(before, computed(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)  # norms compute in float32
    assert not any(report.reason for report in teleporter.turn_back())
    for a, b in zip(before, computed(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turn_back", ["end", "never"])
def test_an_average_goes_to_the_coordinates_of_the_best_checkpoint(tmp_path, turn_back):
    class First(TeleportTrainer):
        def _determine_best_metric(self, metrics, trial):
            return super()._determine_best_metric({**metrics, "eval_loss": float(self.state.global_step)}, trial)

    model = uneven()
    before = [p.detach().clone() for p in model.parameters()]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    settings = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 3,
        "eval_steps": 3,
        "load_best_model_at_end": True,
    }
    trainer = run(
        *(tmp_path, model, following(turn_back=turn_back), [Averaging(average)], First),
        **{"eval_dataset": Texts(9, seed=1), "learning_rate": 0.0, **settings},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    for a, b in zip(model.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0)
    at_home = [torch.allclose(a, p, atol=2e-6) for a, p in zip(before, model.parameters(), strict=True)]
    assert all(at_home) == (turn_back == "end")


def test_an_average_turns_once_however_often_it_is_given(tmp_path):
    model = uneven()
    before = [p.detach().clone() for p in model.parameters()]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    class InAList(TrainerCallback):
        averages = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.averages[0].update_parameters(model)

    callback = InAList()
    callback.averages = [average]
    trainer = run(tmp_path, model, following(turn_back="end"), [callback], learning_rate=0.0)
    trainer.register_average(dict(average.module.named_parameters()))
    trainer.register_average(average.module)
    trainer.train()
    for a, b in zip(before, average.module.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0)


def test_a_dict_may_get_other_tensors_between_events():
    model = uneven().double()
    average = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    teleporter = Teleporter(model, TeleportConfig(method="basis", basis="random"))
    teleporter.register_average(average)
    for seed in range(2):
        teleporter.config = TeleportConfig(method="basis", basis="random", seed=seed)
        assert teleporter.teleport([batch()], lambda model, batch: model(**batch).loss).steps
        for name in average:
            average[name] = 1.0 * average[name]
    teleporter.turn_back()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(average[name], parameter.detach(), atol=1e-12, rtol=0)


def test_averages_that_are_registered_later_take_the_place_of_those_before():
    """Tied weights: the stream turns only if all gains are even, in averages too."""
    model = llama(tie_word_embeddings=True)
    bad, good = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        bad.model.norm.weight[0] = 2.0
    kept = [p.detach().clone() for p in bad.parameters()]
    teleporter = Teleporter(model, TeleportConfig(method="basis", basis="random"))
    reasons = []
    for averages in ([bad], [good], []):
        teleporter.register_average(*averages)
        report = teleporter.teleport([batch()], lambda model, batch: model(**batch).loss)
        reasons += [symmetry.reason for symmetry in report.symmetries if symmetry.kind == "stream"]
    assert "uneven gain" in reasons[0]
    assert reasons[1:] == ["", ""]
    teleporter.register_average()
    assert teleporter.tracker.averages == []
    # It was taken off before the stream turned, and the heads' turns before that stay.
    assert torch.equal(bad.model.embed_tokens.weight, kept[0])


def test_tensors_that_would_turn_wrongly_are_refused(tmp_path):
    tied = llama(tie_word_embeddings=True)
    trainer = run(tmp_path, tied, following())
    with pytest.raises(ValueError, match="is tied in the model and not in the average"):
        trainer.register_average({name: tensor.clone() for name, tensor in tied.state_dict().items()})
    trainer.register_average({name: tensor.clone() for name, tensor in tied.named_parameters()})
    for own in (tied, tied.state_dict()):
        with pytest.raises(ValueError, match="has the model's own"):
            trainer.register_average(own)


def test_trls_averages_are_found(tmp_path):
    model = uneven()
    reference = copy.deepcopy(model)
    bema = BEMACallback(update_freq=1)

    class Mixing(SyncRefModelCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self._sync_target_model(model, self.ref_model, 0.5)

    callbacks = [bema, Mixing(reference, None)]
    trainer = run(tmp_path, model, following(turn_back="end"), callbacks, learning_rate=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    for averaged in (reference.parameters(), bema.running_model.parameters(), bema.ema_params, bema.theta0_params):
        for a, b in zip(before, averaged, strict=True):
            torch.testing.assert_close(b.detach(), a, atol=2e-6, rtol=0)


def test_an_average_that_cannot_follow_is_refused_before_the_first_step(tmp_path):
    model = uneven()
    trainer = run(tmp_path, model, following())
    with pytest.raises(ValueError, match=r"average \(dict\) can't turn along: model.embed_tokens.weight is missing"):
        trainer.register_average({})

    class ModelEmaV3(nn.Module):
        """One by the name of timm's, of another model."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    trainer.ema = ModelEmaV3(llama(hidden_size=16))
    with pytest.raises(ValueError, match=r"ModelEmaV3\) can't turn along: .* has the shape"):
        trainer.train()
    trainer.ema = ModelEmaV3(copy.deepcopy(model))
    trainer.train()
    assert trainer.teleport_reports[-1].steps
