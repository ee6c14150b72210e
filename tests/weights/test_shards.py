"""Weights that stay sharded in an event, on two gloo processes: against gathered ones, and when something goes wrong."""

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods.null_space.method import NullSpace
from hf_teleport.weights.shards import Shards, can_stay_sharded

from ranks import flat, llama, mixtral, run, sharded, tokens
from tiny_models import loss_fn

_SETTINGS = {"scope": "batch", "steps_per_batch": 2}


def teleported(model, rank, size, gathered=False, **settings):
    """The report, the weights after the event, and the most modules whose weights were whole at once."""
    most = 0
    make_whole = Shards._make_whole

    def watched(self, unit):
        nonlocal most
        make_whole(self, unit)
        most = max(most, len(self._open))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "_make_whole", watched)
        if gathered:
            patch.setattr(NullSpace, "on_shards", staticmethod(lambda config: False))
        report = Teleporter(model, TeleportConfig(**{**_SETTINGS, **settings})).teleport(tokens(rank, size)[:2], loss_fn)
    return {"report": report, "weights": flat(model), "most": most}


class Fault:
    """Hooks that fail in process 1 in the midst of a layer, from a call on."""

    def __init__(self, kind, at, backward):
        self.kind, self.at, self.backward, self.calls = kind, at, backward, 0

    def __call__(self, module, args, output):
        if self.backward:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.fail(gradient))
        else:
            self.fail(output)

    def fail(self, tensor):
        self.calls += 1
        if self.calls < self.at:
            return
        if self.kind == "error":
            raise RuntimeError("no such kernel")
        if len(tensor) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


FAULTS = [("error", 5, False), ("error", 4, True), ("memory", 6, False), ("memory", 3, True)]


def faulty(rank, size, fault):
    model = sharded(llama(torch.float32))
    if rank == 1:
        model.model.layers[0].mlp.register_forward_hook(Fault(*fault))
    before = flat(model)
    try:
        outcome = teleported(model, rank, size)["report"].steps
    except RuntimeError as error:
        outcome = str(error)
    return outcome, torch.equal(flat(model), before)


def different(rank, size):
    """What comes of a loss that takes one forward in one process and two in the other."""

    def loss(model, batch):
        return sum(loss_fn(model, batch) for _ in range(1 + rank))

    try:
        Teleporter(sharded(llama(torch.float32)), TeleportConfig()).teleport(tokens(rank, size), loss)
    except RuntimeError as error:
        return str(error)
    return ""


def scenes(rank, size):
    found = {}
    for name, make, dtype in (("experts", mixtral, torch.float64), ("bf16", llama, torch.bfloat16)):
        for gathered in (False, True):
            found[name, gathered] = teleported(sharded(make(dtype)), rank, size, gathered)
    model = sharded(llama(torch.float32))
    before = flat(model)
    undone = teleported(model, rank, size, max_loss_change=1e-12, learning_rate=10.0)
    found["undone"] = undone["report"], torch.equal(flat(model), before)
    found["different"] = different(rank, size)
    found["faults"] = [faulty(rank, size, fault) for fault in FAULTS]
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda path, load=torch.load: load(path, weights_only=False))  # reports too
        return run(scenes, 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(("name", "tolerance"), [("experts", 1e-12), ("bf16", 1e-3)])
def test_weights_that_stay_sharded_end_where_gathered_ones_do(both, name, tolerance):
    first, second = (each[name, False] for each in both)
    gathered = both[0][name, True]
    assert torch.equal(first["weights"], second["weights"])
    assert (first["weights"] - gathered["weights"]).norm() <= tolerance * gathered["weights"].norm()
    assert first["report"].steps == gathered["report"].steps > 0
    assert [v.reason for v in first["report"].layers] == [v.reason for v in gathered["report"].layers]
    assert [v.shape for v in first["report"].layers] == [v.shape for v in gathered["report"].layers]
    moved = [(a.moved_by, b.moved_by) for a, b in zip(first["report"].layers, gathered["report"].layers, strict=True)]
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in moved)


@pytest.mark.parametrize("name", ["experts", "bf16"])
def test_one_layer_is_whole_at_a_time_beside_the_models_own_weights(both, name):
    assert both[0][name, False]["most"] == 2
    assert both[0][name, True]["most"] == 0


def test_shards_come_back_bit_for_bit(both):
    for each in both:
        report, unchanged = each["undone"]
        assert report.steps == 0
        assert unchanged


@pytest.mark.parametrize("i", range(len(FAULTS)), ids=[f"{kind} {'backward' if b else 'forward'}" for kind, _, b in FAULTS])
def test_a_fault_in_the_midst_of_a_layer_is_everybodys(both, i):
    (mine, unchanged), (theirs, theirs_unchanged) = (each["faults"][i] for each in both)
    assert unchanged == theirs_unchanged
    if FAULTS[i][0] == "error":
        assert mine == "another process failed in this teleport; its own message says where."
        assert theirs == "no such kernel"
        assert unchanged
    else:
        assert mine == theirs > 0, "with batches of half the size it goes well"
        assert not unchanged


def test_processes_that_go_through_different_layers_do_not_wait_for_each_other(both):
    assert all("different sharded modules" in each["different"] for each in both)


def test_weights_that_are_not_sharded_cannot_stay_so():
    assert not can_stay_sharded(nn.Linear(2, 2), 1)
