"""After an event: a tracker that fails when it is told of it, and a checkpoint for which the disk has no room."""

import errno

import pytest
import torch
from transformers import TrainerCallback

from hf_teleport.layers.point import loss_at

from faulty import raising, trainer, weights


class Grumpy(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "teleport/steps" in logs:
            raise ConnectionError("the tracker is gone")


def test_a_tracker_that_fails_when_it_is_told_of_a_teleport(tmp_path):
    run = trainer(tmp_path, made={"callbacks": [Grumpy()]})
    with pytest.raises(ConnectionError, match="tracker"):
        run.train()
    (report,) = run.teleport_reports
    assert report.steps
    batches = run._draw(2, event=6).batches
    losses = [loss_at(run.model, run._teleport_loss, batch, seed=0) for batch in batches]
    assert sum(losses) / 2 == pytest.approx(report.loss_before, rel=1e-4)


FULL = OSError(errno.ENOSPC, "No space left on device")

WRITERS = {
    "weights": "transformers.modeling_utils.safe_save_file",
    "optimizer": "torch.save",
    "state": "transformers.trainer_callback.TrainerState.save_to_json",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_at_a_checkpoint_after_a_teleport(tmp_path, monkeypatch, writer):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **saving)
    whole.train()
    cut = trainer(tmp_path / "cut", **saving)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                monkeypatch.setattr(writer, lambda *args, **kwargs: raising(FULL)(None))

    cut.add_callback(Full())
    with pytest.raises(OSError, match="No space left"):
        cut.train()
    assert [report.steps > 0 for report in cut.teleport_reports] == [True]
    monkeypatch.undo()
    resumed = trainer(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
