"""Moves that go wrong are undone, bit for bit."""

import pytest
import torch

from hf_teleport.layers.layer import Layer
from hf_teleport.methods.basis import turn

from faulty import Scene


def exploding(monkeypatch, value):
    """Each step of the null space adds a value to what it moves."""

    def add_(self, move, scale, real=Layer.add_):
        real(self, move + value, scale)

    monkeypatch.setattr(Layer, "add_", add_)


@pytest.mark.parametrize("growth", [2.0, None])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e3])
def test_a_step_that_explodes_is_undone(monkeypatch, value, growth):
    exploding(monkeypatch, value)
    scene = Scene(max_growth=growth)
    report = scene.teleport()
    # At a step it is the gradient that is looked at; the loss is, after the last one.
    reason = "non_finite" if value != 1e3 else "max_loss_change" if growth is None else "max_growth"
    assert report.stopped_because == reason
    assert not any(layer.moved for layer in report.layers)
    scene.assert_untouched()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1.5])
def test_a_turn_that_is_none_is_undone(monkeypatch, factor):
    def carry_out(self, *given, real=turn.Turn.carry_out):
        real(self, *given)
        next(iter(self.rotations)).parts[0].parameter.data.mul_(factor)

    monkeypatch.setattr(turn.Turn, "carry_out", carry_out)
    scene = Scene("basis", max_loss_change=10.0)
    report = scene.teleport(held_back=None)
    assert report.stopped_because == ("not_a_symmetry" if factor == 1.5 else "non_finite")
    assert report.rolled_back
    scene.assert_untouched()


def test_a_weight_that_is_not_finite_is_undone_though_the_loss_is(monkeypatch):
    def add_(self, move, scale, real=Layer.add_):
        real(self, move, scale)
        if self.name == "layers.4":
            self.bias.data[0] = torch.inf  # tanh(inf) = 1

    monkeypatch.setattr(Layer, "add_", add_)
    scene = Scene(max_loss_change=10.0)
    report = scene.teleport()
    assert report.stopped_because == "non_finite"
    scene.assert_untouched()
