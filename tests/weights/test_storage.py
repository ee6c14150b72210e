"""Weights that are sharded or stored in half precision, as a teleport sees them."""

import pytest
import torch
from torch import nn, optim

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.weights.storage import is_low, working_weights

from tiny_models import MODELS, build, loss_fn

LOW = [torch.bfloat16, torch.float16]


def bits(model):
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", LOW)
def test_float32_inside_and_bit_for_bit_the_same_after(dtype):
    model, _ = build("resnet", dtype)
    before, kept = bits(model), dict(model.named_parameters())
    with working_weights(model) as weights:
        assert {t.dtype for t in bits(model).values()} == {torch.float32, torch.int64}
        assert all(kept[name] is weights.origin(parameter) for name, parameter in model.named_parameters())
        assert all(torch.equal(before[name].float(), value) for name, value in bits(model).items() if value.is_floating_point())
    assert all(torch.equal(before[name], value) and before[name].dtype == value.dtype for name, value in bits(model).items())


def test_what_changed_is_rounded_into_its_old_place():
    model = nn.Linear(4, 4).bfloat16()
    place = model.weight.data_ptr()
    with working_weights(model):
        model.weight.data += 1 / 3
        expected = model.weight.data.bfloat16()
    assert torch.equal(model.weight, expected)
    assert model.weight.data_ptr() == place


def test_rounding_shows_what_will_be_stored():
    model = nn.Linear(4, 4).half()
    with working_weights(model) as weights:
        model.weight.data += 1e-6
        assert weights.round()
        seen = model.weight.detach().clone()
    assert torch.equal(model.weight.float(), seen)
    with working_weights(nn.Linear(2, 2)) as weights:
        assert not weights.round()


def test_tensors_that_share_storage_go_on_sharing_it():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).bfloat16()
    model[1].weight.data = model[0].weight.data
    with working_weights(model):
        assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("method", ["null_space", "basis"])
@pytest.mark.parametrize("name", MODELS)
def test_models_loaded_in_half_precision_teleport(name, method, dtype):
    """The difference of two forwards is float32's: in bf16 it would drown."""
    model, batch = build(name, dtype)
    optimizer = optim.AdamW(model.parameters(), lr=1e-4, eps=1e-4)  # float16 has no 1e-8
    loss_fn(model, batch).backward()
    optimizer.step()
    before = bits(model)
    report = Teleporter(model, TeleportConfig(method=method), optimizer=optimizer).teleport([batch], loss_fn)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(value.dtype == dtype for value in optimizer.state[next(model.parameters())].values() if value.dim())
    if (name, method) == ("resnet", "basis"):
        assert report.stopped_because == "nothing_movable"
        return
    assert report.steps > 0
    assert abs(report.loss_after / report.loss_before - 1) < 2e-3
    grown = report.grad_norm_after / report.grad_norm_before
    assert grown > 1.5 if method == "null_space" else 0.95 < grown < 1.05
    moved = {layer.name for layer in report.layers if layer.moved}
    for name, value in bits(model).items():
        if value.dim() > 1 and name.removesuffix(".weight") not in moved:
            assert torch.equal(value, before[name]), name


def test_the_guard_judges_the_rounded_weights():
    """Where rounding alone changes the loss by more than is allowed, every weight is put back."""
    model, batch = build("t5", torch.bfloat16)
    before = bits(model)
    report = Teleporter(model, TeleportConfig(method="basis", max_loss_change=1e-9)).teleport([batch], loss_fn)
    assert report.rolled_back
    assert report.stopped_because == "max_loss_change"
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())


def test_inputs_in_half_precision_become_float32_too():
    model, batch = build("vit", torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert is_low(model)
    seen = []

    def loss(model, batch):
        seen.append(batch["pixel_values"].dtype)
        return loss_fn(model, batch)

    Teleporter(model).teleport([batch], loss)
    assert set(seen) == {torch.float32}


def test_whole_weights_in_full_precision_need_no_stand_in():
    model = nn.Linear(3, 3)
    weight = model.weight
    with working_weights(model) as weights:
        assert model.weight is weight
        assert weights.origin(weight) is weight


def test_hooks_on_stored_weights_stay():
    """DDP's are on the node that accumulates a gradient, which a weight loses with its dtype."""
    model, calls = nn.Linear(3, 3).bfloat16(), []
    model.weight.register_post_accumulate_grad_hook(lambda weight: calls.append("after"))
    node = model.weight.view_as(model.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append("node"))
    batches = [torch.randn(2, 3).bfloat16()]
    Teleporter(model, TeleportConfig()).teleport(batches, lambda model, x: model(x).square().mean())
    model(batches[0]).sum().backward()
    assert sorted(calls) == ["after", "node"]


def test_a_recurrent_layer_that_keeps_a_list_of_its_weights():
    model = nn.LSTM(4, 4).bfloat16()
    x = torch.randn(3, 2, 4)
    with working_weights(model):
        assert model(x)[0].dtype == torch.float32
    assert model(x.bfloat16())[0].dtype == torch.bfloat16


def test_the_optimizers_state_follows_and_may_be_dropped():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).bfloat16()
    optimizer = optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with working_weights(model, optimizer.state):
        first, second = (optimizer.state[layer.weight] for layer in model)
        first["exp_avg"] = first["exp_avg"] + 1
        del optimizer.state[model[1].weight]
    assert optimizer.state[model[0].weight]["exp_avg"].min() > 1
    assert model[1].weight not in optimizer.state
    assert set(optimizer.state) == {model[0].weight, model[0].bias, model[1].bias}
    assert second["exp_avg"].dtype == torch.bfloat16


def test_weights_tied_by_a_view_stay_tied():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)).bfloat16()
    model[2].weight.data = model[0].weight.data.t()
    before = bits(model)
    batches = [torch.randn(3, 6).bfloat16()]
    report = Teleporter(model).teleport(batches, lambda model, x: model(x).square().mean())
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "shares its storage" in reasons["0"]
    assert "shares its storage" in reasons["2"]
    assert all(torch.equal(before[f"{name}.weight"], model[int(name)].weight) for name in "02")


def test_quantized_and_frozen_weights_are_not_rewritten():
    class Packed(nn.Parameter):
        """As bitsandbytes': bytes that call themselves bf16."""

    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3).bfloat16())
    model[0].weight = Packed(model[0].weight.data, requires_grad=False)
    model[1].weight.requires_grad = False
    model[1].weight.data.view(torch.int16)[0, 0] = 0x7FC1  # a NaN with a payload
    packed, frozen = (layer.weight.data.view(torch.int16).clone() for layer in model)
    with working_weights(model):
        assert isinstance(model[0].weight, Packed)
        assert model[1].weight.dtype == torch.float32
    assert torch.equal(model[0].weight.data.view(torch.int16), packed)
    assert torch.equal(model[1].weight.data.view(torch.int16), frozen)
