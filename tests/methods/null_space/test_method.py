"""The null space method: what its layers share."""

import torch
import torch.nn.functional as F
from torch import nn

from hf_teleport import TeleportConfig
from hf_teleport.layers.subspace import Representation, null_space
from hf_teleport.methods import NullSpace

from tiny_models import build, loss_fn


def prepared(model, loss_fn, batches, **settings):
    """The method with its null spaces, and the points of the batches."""
    method = NullSpace(model.eval(), loss_fn, TeleportConfig(**settings))
    points = [method.evaluate(batch, i) for i, batch in enumerate(batches)]
    for point in points:
        method.survey(point)
    method.fit()
    return method, points


def own(layer, points):
    """A layer's null space from its own inputs alone."""
    representation = Representation()
    for point in points:
        layer.represent(point.trace.uses[layer.weight][layer.region], representation)
    return null_space(representation, 1.0, layer.weight.dtype)


def assert_own(method, points):
    for layer, subspace in method.subspaces.items():
        expected = own(layer, points)
        assert (subspace.null_dim, subspace.num_rows) == (expected.null_dim, expected.num_rows), layer.name
        rows = torch.randn(1, 5, subspace.dim, dtype=layer.weight.dtype)
        torch.testing.assert_close(subspace.project(rows), expected.project(rows))


def test_layers_of_one_input_share_a_null_space():
    model, batch = build("llama")
    halves = [{key: value[:1] for key, value in batch.items()}, {key: value[1:2] for key, value in batch.items()}]
    method, points = prepared(model, loss_fn, halves)
    assert_own(method, points)
    by_name = {layer.name: subspace for layer, subspace in method.subspaces.items()}
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert by_name[f"{attention}q_proj"] is by_name[f"{attention}v_proj"]
    assert by_name[f"{mlp}gate_proj"] is by_name[f"{mlp}up_proj"]
    assert len({id(subspace) for subspace in by_name.values()}) == 2 * 4 + 1  # of two blocks, and the head


class Parting(nn.Module):
    """Two layers with the same input in some batches, and with different ones in others; a third has a bias."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(6, 40)
        self.a, self.b = nn.Linear(40, 3, bias=False), nn.Linear(40, 3, bias=False)
        self.c = nn.Linear(40, 3)

    def forward(self, x, together):
        x = torch.tanh(self.below(x))
        return self.a(x) + self.b(x if together else x * x) + self.c(x)


def test_layers_that_part_have_their_own():
    torch.manual_seed(0)
    model = Parting().double()
    batches = [(torch.randn(4, 6).double(), torch.arange(4) % 3, together) for together in (True, False, True)]
    loss = lambda model, batch: F.cross_entropy(model(batch[0], batch[2]), batch[1])  # noqa: E731
    method, points = prepared(model, loss, batches)
    assert len({id(subspace) for subspace in method.subspaces.values()}) == 4
    assert_own(method, points)
    method, points = prepared(model, loss, batches[::2])
    subspaces = {layer.name: subspace for layer, subspace in method.subspaces.items()}
    assert subspaces["a"] is subspaces["b"]
    assert subspaces["c"] is not subspaces["a"]
    assert_own(method, points)


def test_a_layer_that_has_no_direction_but_rounding_stays_bit_for_bit(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    batch = torch.randn(4, 12).double(), torch.arange(4)
    method, _ = prepared(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [batch])
    middle = next(layer for layer in method.layers if layer.weight is model[2].weight)
    projected = NullSpace._projected

    def rounded(self, point, slope):
        moves = projected(self, point, slope)
        moves[middle] *= 1e-18
        return moves

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(NullSpace, "_projected", rounded)
        before = [p.detach().clone() for p in model.parameters()]
        method.propose(method.begin(batch, 0))(1.0)
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert moved == [False, False, not patched, not patched, True, True]
