"""Weights that are shifted for a while, all at once or each as it is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_teleport.layers.shift import shifted
from hf_teleport.layers.trace import Trace
from hf_teleport.weights.isolation import evaluation_mode, plain_execution

from tiny_models import build, loss_fn


def test_shifted_weights_come_back_bit_for_bit_even_by_an_error():
    layer = nn.Linear(4, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    direction = [torch.randn_like(layer.weight), None]

    @shifted(layer.parameters(), direction, 0.1)
    def failing():
        torch.testing.assert_close(layer.weight.detach(), before[0] + 0.1 * direction[0])
        assert torch.equal(layer.bias, before[1])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "resnet", "mamba"])
def test_weights_shifted_when_they_are_read_give_what_weights_shifted_at_once_give(name):
    model, batch = build(name)
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) * 0.1 for p in parameters]
    with plain_execution(), evaluation_mode(model), torch.no_grad():
        with Trace(parameters) as trace:
            plain = loss_fn(model, batch)
        with shifted(parameters, directions, 0.5):
            expected = loss_fn(model, batch)
        addresses = [p.data_ptr() for p in parameters]
        with shifted(parameters, directions, 0.5, when_read=set(trace.uses)):
            away = {id(p) for p, address in zip(parameters, addresses, strict=True) if p.data_ptr() != address}
            found = loss_fn(model, batch)
    assert trace.uses
    assert away == {id(p) for p in parameters if p not in trace.uses}
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert [p.data_ptr() for p in parameters] == addresses


class Counted(TorchFunctionMode):
    """Counts calls, and looks at a weight after each."""

    def __init__(self, weight):
        self.calls, self.address, self.weight = 0, weight.data_ptr(), weight
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.calls += 1
        assert self.weight.data_ptr() == self.address
        return output


def test_a_weight_that_is_shifted_when_it_is_read_is_back_after_every_call():
    weight = nn.Parameter(torch.randn(3, 4))
    u, x = torch.randn(3, 4), torch.randn(2, 4)
    there = weight.detach() + 0.1 * u
    with torch.no_grad(), shifted([weight], [u], 0.1, when_read=[weight]), Counted(weight) as counted:
        views = [weight.T, weight.t().mT, weight.data.mT, weight.chunk(2)[0]]
        assert weight.dtype == torch.float32
        assert weight.shape == (3, 4)
        product = F.linear(input=x, weight=weight)
        joined = torch.cat([weight, weight])
    assert counted.calls >= 10
    for found, expected in zip([*views, product, joined], [there.T, there, there.T, there[:2]], strict=False):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(product, x @ there.T)
    torch.testing.assert_close(joined, torch.cat([there, there]))


def test_to_ask_a_weight_for_its_dtype_or_size_makes_no_copy(monkeypatch):
    weight, made = nn.Parameter(torch.randn(3, 4)), []
    make = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **kwargs: made.append(args) or make(*args, **kwargs))
    with shifted([weight], [torch.randn(3, 4)], 0.1, when_read=[weight]):
        assert weight.dtype is torch.float32
        assert weight.device.type == "cpu"
        assert weight.grad is None
        assert weight.stride() == (4, 1)
        assert weight.size(0) == 3
        assert weight.data_ptr()
        assert not made
        weight.sum()
        assert len(made) == 1


def test_an_error_while_a_weight_is_read_leaves_it_where_it_was():
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shapes"), shifted([layer.weight], [before], 1.0, when_read=[layer.weight]):
        layer(torch.randn(2, 5))
    assert torch.equal(layer.weight, before)


def test_a_weight_amid_the_memory_of_others_is_shifted_at_once_for_its_views_know_their_place_there():
    memory = torch.randn(20)
    weight = nn.Parameter(memory[8:].view(3, 4))
    address = weight.data_ptr()
    with shifted([weight], [torch.ones(3, 4)], 1.0, when_read=[weight]):
        assert weight.data_ptr() != address
    assert weight.data_ptr() == address
