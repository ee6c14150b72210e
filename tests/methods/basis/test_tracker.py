"""What a run knows of its bases between events."""

import torch
from torch import nn

from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.methods.basis.way import Way


class Halves(nn.Module):
    """Two symmetries with one writer, one kind and one size."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.w, self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        u, v = self.w(x).chunk(2, -1)
        return self.a(u) + self.b(v)


def looked(model, x):
    """A tracker that has looked at one step."""
    tracker = Tracker(every=1)
    symmetries, reasons = find_symmetries(model, lambda model, x: model(x).square().mean(), x)
    tracker.begin(symmetries, reasons, frozenset())
    model(x).square().mean().backward()
    tracker.look(0)
    return tracker, symmetries


def test_two_symmetries_of_one_writer_keep_their_own_moments():
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(6, 5)
    tracker, symmetries = looked(model, x)
    turning = [symmetry for symmetry in symmetries if not symmetry.reason]
    assert len(turning) == 2
    assert len({(s.kind, s.name, s.blocks, s.size) for s in turning}) == 1
    first, second = (tracker.values[symmetry] for symmetry in turning)
    assert not torch.allclose(first, second)
    resumed = Tracker(every=1)
    resumed.load(tracker.saved(model), model)
    again, reasons = find_symmetries(model, lambda model, x: model(x).square().mean(), x)
    resumed.begin(again, reasons, frozenset())
    for old, new in zip(turning, (symmetry for symmetry in again if not symmetry.reason), strict=True):
        assert [part.positions.tolist() for part in old.parts] == [part.positions.tolist() for part in new.parts]
        assert torch.equal(resumed.values[new], tracker.values[old])
    assert isinstance(resumed.way, Way)
