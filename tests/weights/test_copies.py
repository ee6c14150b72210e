import pytest
import torch
from torch import nn

from hf_teleport.weights.copies import copied, put, tensors_in
from hf_teleport.weights.snapshot import Snapshot


class Projector:
    def __init__(self):
        self.matrix = torch.ones(2)


def test_nested_values_are_copied_deep():
    state = {"a": [torch.ones(2), {"b": torch.ones(3)}], "projector": Projector(), "step": 3}
    own = copied(state)
    for tensor in tensors_in(state):
        tensor.zero_()
    assert len(list(tensors_in(own))) == 3
    assert all(tensor.all() for tensor in tensors_in(own))
    assert own["step"] == 3


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_tensors_are_copied_and_put_back(bits):
    torchao = pytest.importorskip("torchao.optim")
    kind = {4: torchao.AdamW4bit, 8: torchao.AdamW8bit}[bits]
    weight = nn.Parameter(torch.randn(80, 64))
    optimizer = kind([weight])
    with torch.compiler.set_stance("force_eager"):
        weight.grad = torch.randn(80, 64)
        optimizer.step()
    state = optimizer.state[weight]
    codes = state["exp_avg"].codes.clone()
    kept = Snapshot([weight], optimizer.state)
    state["exp_avg"].copy_(torch.randn(80, 64))
    assert not torch.equal(state["exp_avg"].codes, codes)
    same = state["exp_avg"]
    kept.restore()
    assert state["exp_avg"] is same
    assert torch.equal(same.codes, codes)


def test_what_does_not_fit_is_not_put():
    assert not put(torch.zeros(2), torch.zeros(3))
    assert not put(None, torch.zeros(3))
    assert put(torch.zeros(3), torch.ones(3))
