"""A step of a method: made, made shorter, taken back."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_teleport.methods import Move
from hf_teleport.weights.snapshot import Snapshot


def moving(straight):
    torch.manual_seed(0)
    weight, direction = nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)

    def carry_out(fraction, direction=direction):
        weight.data.add_(direction, alpha=fraction)

    return weight, direction, Move(carry_out, lambda: Snapshot([weight]), straight)


@pytest.mark.parametrize("straight", [True, False])
def test_a_move_is_made_halved_and_taken_back(straight):
    weight, direction, move = moving(straight)
    before = weight.detach().clone()
    move.make()
    torch.testing.assert_close(weight.detach(), before + direction)
    for fraction in (0.5, 0.25, 0.125):
        move.halve()
        assert move.fraction == fraction
        torch.testing.assert_close(weight.detach(), before + fraction * direction)
    move.undo()
    assert torch.equal(weight, before)


def test_what_a_straight_move_is_made_of_goes_when_it_is_made():
    _, direction, move = moving(straight=True)
    gone = weakref.ref(direction)
    move.make()
    del direction
    gc.collect()
    assert gone() is None
    move.halve()
    with pytest.raises(RuntimeError, match="use another"):
        move(1.0)


def test_a_move_without_a_way_back_makes_no_copy():
    weight, direction, move = moving(straight=True)
    before = weight.detach().clone()
    move(0.5), move(0.5)
    torch.testing.assert_close(weight.detach(), before + direction)
