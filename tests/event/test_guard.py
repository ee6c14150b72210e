"""The limits of an event."""

import math
from types import SimpleNamespace

import pytest

from hf_teleport import TeleportConfig
from hf_teleport.event.guard import Guard


def point(loss=1.0, grad_norm=1.0):
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    return SimpleNamespace(loss=loss, grad_norm=grad_norm, finite=finite)


@pytest.mark.parametrize(
    ("settings", "at", "objection"),
    [
        ({}, point(), ""),
        ({}, point(loss=math.nan), "non_finite"),
        ({}, point(grad_norm=math.inf), "non_finite"),
        ({"max_loss_change": 0.1}, point(loss=1.09), ""),
        ({"max_loss_change": 0.1}, point(loss=0.89), "max_loss_change"),
        ({"max_loss_change": None}, point(loss=5.0), ""),
        ({"max_growth": 2}, point(grad_norm=2.1), ""),
        ({"max_growth": 2}, point(grad_norm=2.3), "max_growth"),
        ({"max_growth": None}, point(grad_norm=100.0), ""),
    ],
)
def test_objections(settings, at, objection):
    assert Guard(TeleportConfig(**settings)).objection(at, loss=1.0, grad_norm=1.0) == objection


@pytest.mark.parametrize(
    ("settings", "grad_norm", "limit"),
    [
        ({}, 1.9, ""),
        ({}, 2.0, "max_growth"),
        ({"max_growth": None}, 100.0, ""),
        ({"max_growth": None, "grad_norm_cap": 3}, 2.9, ""),
        ({"max_growth": None, "grad_norm_cap": 3}, 3.0, "grad_norm_cap"),
    ],
)
def test_limits(settings, grad_norm, limit):
    assert Guard(TeleportConfig(**settings)).limit(point(grad_norm=grad_norm), grad_norm=1.0) == limit
