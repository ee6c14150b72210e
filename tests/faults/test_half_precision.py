"""Faults where weights are stored in half precision, and faults that only half precision has."""

from itertools import count

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.layer import Layer

from faulty import METHODS, RAISED, Scene, broken, looks, net_loss, out_of_memory, raising, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_leaves_weights_in_half_precision_as_they_were(method, dtype):
    scene = Scene(method, dtype)
    for at in looks(method):
        with pytest.raises(RuntimeError, match="cable"):
            scene.teleport(broken(scene.loss, raising(RAISED["error"]), at))
        assert scene.untouched(), at
    assert scene.surroundings() == scene.around
    scene.train()


class Mixed(nn.Module):
    """Every second layer is stored in half precision."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)])
        self.layers[1].bfloat16()
        self.layers[2].half()

    def forward(self, x, labels):
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return nn.functional.cross_entropy(x.float(), labels)


def test_a_model_of_several_precisions():
    model = Mixed()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = rows(8, 1)
    report = Teleporter(model, TeleportConfig()).teleport([batch], net_loss)
    assert {layer.name for layer in report.layers if layer.moved} == {"layers.1", "layers.2", "layers.3"}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == {n: p.dtype for n, p in before.items()}
    assert all(torch.equal(before[f"layers.0.{name}"], p) for name, p in model.layers[0].named_parameters())
    after = float(model.float()(**batch).detach())
    assert after == pytest.approx(report.loss_after, rel=1e-6)
    model.load_state_dict(before)
    assert after == pytest.approx(float(model(**batch).detach()), rel=0.01)


def test_what_overflows_when_it_is_rounded_is_undone(monkeypatch):
    """A direction that no input has may carry any weight in float32; float16 ends at 65504."""

    def add_(self, move, scale, real=Layer.add_):
        real(self, move, scale)
        if self.name == "layers.4":
            self.weight.data[:, 0] = 1e6

    scene = Scene(dtype=torch.float16)
    for model_row in (scene.model.layers[0].weight, scene.model.layers[0].bias, scene.model.layers[1].bias):
        model_row.data[0] = 0  # the first unit is silent
    scene.model.layers[1].running_mean[0] = 0
    scene.remember()
    monkeypatch.setattr(Layer, "add_", add_)
    report = scene.teleport(held_back=None)
    assert (report.stopped_because, report.rolled_back) == ("non_finite", True)
    assert scene.untouched()


def test_memory_that_runs_out_while_weights_become_float32(monkeypatch):
    scene, calls = Scene(dtype=torch.bfloat16), count(1)

    def float_(self, real=torch.Tensor.float):
        if next(calls) == 3:
            raise out_of_memory()
        return real(self)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    assert scene.teleport().steps
    monkeypatch.undo()
    assert {parameter.dtype for parameter in scene.model.parameters()} == {torch.bfloat16}
