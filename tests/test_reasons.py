import pytest
import torch
from torch import nn

from hf_teleport.reasons import NO_DIRECTION, NO_STEP, explain
from hf_teleport.report import LayerReport


@pytest.mark.parametrize("steps", [0, 3])
def test_each_weight_moved_or_has_a_reason(steps):
    moved, still, known = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    reports = {p: LayerReport(name, "linear", [2, 2]) for p, name in ((moved, "a"), (still, "b"), (known, "c"))}
    reports[known].reason = "frozen"
    explain(reports, {moved: 0.5} if steps else {}, steps, "max_growth")
    assert reports[known].reason == "frozen"
    if steps:
        assert (reports[moved].moved, reports[moved].moved_by, reports[moved].reason) == (True, 0.5, "")
        assert (reports[still].moved, reports[still].moved_by) == (False, 0.0)
        assert reports[still].reason == NO_DIRECTION
    else:
        assert not any(report.moved for report in reports.values())
        assert reports[still].reason == "no step was kept (max_growth)"


def test_every_reason_says_what_to_do():
    for reason, text in NO_STEP.items():
        assert any(word in text for word in ("lower", "raise", "check", "take", "teleport it later", "report")), reason
