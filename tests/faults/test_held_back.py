"""A move that changes the loss of the batch held back is shortened, then undone."""

from itertools import count

import pytest
import torch

from hf_teleport import TeleportConfig

from faulty import Scene, trained, trainer, weights


def looking_back(scene, seen, drift=0.0):
    """The scene's loss; on the batch held back it is noted, and has grown by `drift` at each look."""

    def loss(model, batch):
        value = scene.loss(model, batch)
        if batch is scene.held_back:
            value = value + sum(drift for _ in seen)
            seen.append(float(value))
        return value

    return loss


def test_a_move_that_changes_the_loss_held_back_is_shortened():
    unguarded = Scene(max_loss_change=1.0)
    unguarded.teleport()
    (_, start), (_, end) = unguarded.losses, unguarded.evaluated()
    full = weights(unguarded.model) - torch.cat([unguarded.before[n].flatten() for n, _ in unguarded.model.named_parameters()])
    limit = abs(end - start) / start / 6

    scene, seen = Scene(max_loss_change=limit), []
    report = scene.teleport(looking_back(scene, seen))
    assert report.steps == 4
    reference, *tries = seen
    changes = [abs(loss - reference) / reference for loss in tries]
    assert len(tries) == 3
    assert min(changes[:-1]) > limit >= changes[-1]
    before = torch.cat([scene.before[n].flatten() for n, _ in scene.model.named_parameters()])
    torch.testing.assert_close(weights(scene.model) - before, full / 4, rtol=1e-3, atol=1e-6)
    scene.assert_sound()


def test_a_move_that_changes_the_loss_held_back_at_any_length_is_undone():
    scene, seen = Scene(max_loss_change=1e-5), []
    report = scene.teleport(looking_back(scene, seen))
    assert (report.stopped_because, report.rolled_back, report.steps) == ("held_back", True, 0)
    assert len(seen) == 6
    assert all("held_back" in layer.reason or not layer.movable for layer in report.layers)
    scene.assert_untouched()


def test_a_turn_that_changes_the_loss_held_back_is_undone_at_once():
    scene, seen = Scene("basis"), []
    report = scene.teleport(looking_back(scene, seen, drift=1.0))
    assert (report.stopped_because, report.rolled_back, len(seen)) == ("held_back", True, 2)
    scene.assert_untouched()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_while_a_move_is_being_shortened(at):
    scene, calls = Scene(max_loss_change=1e-5), count()

    def loss(model, batch):
        if batch is scene.held_back and next(calls) == at:
            raise RuntimeError("the cable was pulled")
        return scene.loss(model, batch)

    with pytest.raises(RuntimeError, match="cable"):
        scene.teleport(loss)
    scene.assert_untouched()


def test_a_batch_held_back_with_no_finite_loss_is_not_watched():
    scene = Scene()
    scene.held_back["x"][0] = torch.nan
    scene.remember()
    assert scene.teleport().steps
    assert all(value.isfinite().all() for value in scene.state().values())


def test_a_loss_held_back_that_is_not_finite_any_more():
    scene, seen = Scene(max_loss_change=None), []
    report = scene.teleport(looking_back(scene, seen, drift=torch.inf))
    assert report.stopped_because == "held_back"
    scene.assert_untouched()


def test_an_event_undone_by_the_batch_held_back_costs_training_nothing(tmp_path):
    config = TeleportConfig(method="null_space", steps=[6], num_batches=2, batch_size=4, steps_per_batch=2, max_loss_change=1e-6)
    run = trainer(tmp_path, config=config)
    run.train()
    assert [report.stopped_because for report in run.teleport_reports] == ["held_back"]
    assert torch.equal(weights(run.model), trained(tmp_path))
