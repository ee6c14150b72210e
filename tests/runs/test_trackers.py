"""`report_to`: what a tracker has received of the teleports, read back from its own files. What is not installed is skipped."""

import pytest

from tiny_runs import make, teleports

NUMBERS = ("loss_before", "loss_after", "grad_norm_before", "grad_norm_after", "null_dim", "moved_share", "steps", "seconds")


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    trainer = make(tmp_path, config=teleports("null_space", steps=[2, 6]), report_to="tensorboard")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    told = accumulator.EventAccumulator(str(file.parent)).Reload()
    for name in NUMBERS:
        points = [(point.step, point.value) for point in told.Scalars(f"train/teleport/{name}")]
        expected = [report.metrics()[name] for report in trainer.teleport_reports]
        assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in zip((2, 6), expected, strict=True)]
