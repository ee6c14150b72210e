import pytest
import torch
from torch import nn

from hf_teleport.event.reasons import NO_STEP, explain, why_unmoved
from hf_teleport.report import LayerReport, TeleportReport


@pytest.mark.parametrize("steps", [0, 3])
def test_each_weight_moved_or_has_a_reason(steps):
    moved, still, known = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    reports = {p: LayerReport(name, "linear", [2, 2]) for p, name in ((moved, "a"), (still, "b"), (known, "c"))}
    reports[known].reason = "frozen"
    explain(reports, {moved: 0.5} if steps else {}, steps, "max_growth", "no direction")
    assert reports[known].reason == "frozen"
    if steps:
        assert (reports[moved].moved, reports[moved].moved_by, reports[moved].reason) == (True, 0.5, "")
        assert (reports[still].moved, reports[still].moved_by) == (False, 0.0)
        assert reports[still].reason == "no direction"
    else:
        assert not any(report.moved for report in reports.values())
        assert reports[still].reason == "no step was kept (max_growth)"


def test_every_reason_says_what_to_do():
    for reason, text in NO_STEP.items():
        assert any(word in text for word in ("lower", "raise", "check", "take", "teleport it later", "report")), reason


@pytest.mark.parametrize("free", [0, 3])
def test_fresh_adapters_are_told_of_their_a_beside_their_b(free):
    layers = [
        LayerReport("lora_A", "q", [4, 8], null_dim=free, movable=True),
        LayerReport("lora_B", "q", [8, 4], null_dim=0, movable=True),
    ]
    layers[0].reason = "" if free else "no null space"
    layers[1].reason = "no null space"
    report = TeleportReport("null_space", 1.0, 1.0, 1.0, 1.0, 0, "no_direction", False, 0.0, layers=layers)
    assert why_unmoved(report) == "no null space" + (f"; for the other layers: {NO_STEP['no_direction']}" if free else "")
