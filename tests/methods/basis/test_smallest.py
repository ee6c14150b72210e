"""The smallest turn: eigenvectors in the places of the coordinates they are nearest to."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_teleport.methods.basis.smallest import smallest_turn


def rotation(size, angle=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.matrix_exp(angle * (skew - skew.T))


def moment(values, turn):
    return turn.T @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn


@given(size=st.integers(1, 6), seed=st.integers(0, 30))
def test_no_other_order_or_sign_of_the_eigenvectors_is_nearer(size, seed):
    matrix = moment([1.0 + i for i in range(size)], rotation(size, seed=seed))
    found = smallest_turn(matrix[None])[0]
    turned = found @ matrix @ found.T
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), atol=1e-10, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(size).double(), atol=1e-10, rtol=0)
    overlap = found.diagonal().square().sum()
    orders = itertools.permutations(range(size))
    assert all(found[list(order)].diagonal().square().sum() <= overlap + 1e-10 for order in orders)
    assert (found.diagonal() >= 0).all()


def test_what_is_diagonal_already_does_not_turn():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.5]).double())
    assert torch.equal(smallest_turn(matrix[None])[0], torch.eye(4).double())


def test_a_small_rotation_is_undone_and_nothing_else():
    turn = rotation(5, angle=0.02)
    found = smallest_turn(moment([5, 1, 4, 2, 3], turn)[None])[0]
    torch.testing.assert_close(found, turn, atol=1e-10, rtol=0)


def test_equal_eigenvalues_are_not_turned_among_themselves():
    """The middle three are equal to within the tolerance: their space is known, and inside it nothing is."""
    turn = rotation(5, angle=0.1)
    values = [10.0, 1.02, 1.0, 0.98, 0.1]  # three within 0.001 * 5 * 10
    found = smallest_turn(moment(values, turn)[None], tolerance=0.001)[0]
    torch.testing.assert_close(found @ found.T, torch.eye(5).double(), atol=1e-10, rtol=0)
    inside = found[1:4]
    # It is the same space, and within it the nearest to the coordinates: the product is symmetric (Procrustes).
    torch.testing.assert_close(inside.T @ inside, turn[1:4].T @ turn[1:4], atol=1e-10, rtol=0)
    torch.testing.assert_close(inside[:, 1:4], inside[:, 1:4].T, atol=1e-10, rtol=0)
    assert (found - torch.eye(5)).norm() < (smallest_turn(moment(values, turn)[None])[0] - torch.eye(5)).norm()


def test_what_no_gradient_reaches_stays():
    """Gradients in two directions say nothing of the other four."""
    rows = rotation(6, seed=3)[:2]
    found = smallest_turn((rows.T @ torch.diag(torch.tensor([2.0, 1.0]).double()) @ rows)[None])[0]
    rest = found - torch.eye(6)
    # The turn is the identity on vectors that are orthogonal to both the two directions and the coordinates they move to.
    assert torch.linalg.matrix_rank(rest, atol=1e-8) <= 4


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_blocks_are_turned_one_by_one(tolerance):
    matrices = torch.stack([moment([1, 2, 3], rotation(3, seed=i)) for i in range(4)])
    found = smallest_turn(matrices, tolerance)
    for matrix, turn in zip(matrices, found, strict=True):
        assert torch.equal(smallest_turn(matrix[None], tolerance)[0], turn)
