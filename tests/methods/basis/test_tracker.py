"""What a run knows of its bases between events."""

import torch

from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.tracker import Tracker

from tiny_models import Halves


def loss(model, x):
    return model(x).square().mean()


def looked(model, x):
    """A tracker that has looked at one step."""
    tracker = Tracker(every=1)
    symmetries, reasons = find_symmetries(model, loss, x)
    tracker.begin(symmetries, reasons, frozenset())
    loss(model, x).backward()
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
    again, reasons = find_symmetries(model, loss, x)
    resumed.begin(again, reasons, frozenset())
    for old, new in zip(turning, (symmetry for symmetry in again if not symmetry.reason), strict=True):
        assert [part.positions.tolist() for part in old.parts] == [part.positions.tolist() for part in new.parts]
        assert torch.equal(resumed.values[new], tracker.values[old])


def test_what_one_of_them_saw_does_not_become_the_others():
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(6, 5)
    tracker, symmetries = looked(model, x)
    (_, second) = (symmetry for symmetry in symmetries if not symmetry.reason)
    again, reasons = find_symmetries(model, loss, x, {model.a.weight: "not selected"})
    expected = tracker.values[second]
    tracker.begin(again, reasons, frozenset({model.a.weight}))
    (left,) = (symmetry for symmetry in again if not symmetry.reason)
    assert torch.equal(tracker.values[left], expected)
