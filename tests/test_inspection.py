import pytest
import torch

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.inspection import inspect_model, judged, run_cost
from hf_teleport.methods import NullSpace

from tiny_models import build, loss_fn


def test_weights_modes_and_gradients_are_as_before():
    model, batch = build("vit")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = inspect_model(model, batch, loss_fn)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert found.loss > 0


def test_every_layer_has_dimensions_and_a_verdict():
    model, batch = build("resnet")
    for layer in inspect_model(model, batch, loss_fn).layers:
        assert layer.moved != bool(layer.reason)
        assert bool(layer.null_dims) == layer.movable
        if layer.movable:
            assert layer.null_dims["1"] == layer.null_dim
            assert layer.tokens > 0


def test_with_settings_of_a_change_of_basis():
    model, batch = build("llama")
    found = inspect_model(model, batch, loss_fn, TeleportConfig(method="basis", symmetries=["value_output"]))
    assert {layer.name.rsplit(".", 1)[-1] for layer in found.layers if layer.moved} == {"v_proj", "o_proj"}


def test_the_cost_of_a_run_is_that_of_its_events_and_of_looking_at_its_gradients():
    model, batch = build("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = run_cost(model, batch, loss_fn, max_steps=100, processes=2)
    assert run.steps == [10, 20, 40]
    assert run.looks == 8
    assert run.seconds == pytest.approx(3 * run.event.event_seconds + 8 * run.event.look_seconds)
    assert run.share == pytest.approx(run.seconds / (100 * run.event.pass_seconds))
    assert set(run.by_process) == {0, 1}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="max_steps = 1 is not allowed"):
        run_cost(model, batch, loss_fn, max_steps=1)


def test_under_autocast_and_with_buffers():
    model, batch = build("resnet", dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert any(layer.moved for layer in inspect_model(model, batch, loss_fn).layers)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["null_space", "basis"])
def test_a_batch_that_shows_nothing_is_an_error(method):
    model, batch = build("llama")
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match=r"the loss on a teleport batch is nan; .*\.$"):
        judged(Teleporter(model, TeleportConfig(method=method)), nothing, loss_fn)
    if method == "null_space":
        with pytest.raises(ValueError, match="the loss on a teleport batch is nan"):
            inspect_model(model, nothing, loss_fn)


def test_memory_that_runs_out_in_the_step_is_said(monkeypatch):
    model, batch = build("llama")

    def fails(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(NullSpace, "fit", fails)
    with pytest.raises(ValueError, match="memory ran out, with smaller batches too; lower batch_size"):
        inspect_model(model, batch, loss_fn)
