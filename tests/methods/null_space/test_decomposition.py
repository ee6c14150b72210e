"""Null spaces of one process; those of several are compared with them in test_distributed.py."""

import pytest
import torch

from hf_teleport.layers.subspace import Representation, null_space
from hf_teleport.methods.null_space.decomposition import null_spaces
from hf_teleport.weights.ranks import ALONE


def represented(rows):
    representation = Representation()
    representation.add(rows)
    return representation


def test_one_for_each_layer_that_saw_rows():
    known = {"a": represented(torch.randn(1, 3, 8)), "b": represented(torch.randn(2, 20, 4))}
    dtypes = {"a": torch.float32, "b": torch.float64, "unseen": torch.float32}
    found = null_spaces(known, dtypes, 0.9, ALONE)
    assert list(found) == ["a", "b"]
    for key, subspace in found.items():
        expected = null_space(known[key], 0.9, dtypes[key])
        assert torch.equal(subspace.basis, expected.basis)
        assert subspace.basis.dtype == dtypes[key]
        assert subspace.num_rows == known[key].num_rows


@pytest.mark.parametrize("rows", [3, 20])
def test_rows_that_are_not_finite_have_none(rows, caplog):
    broken = torch.randn(1, rows, 8)
    broken[0, 1, 2] = torch.nan
    known = {"broken": represented(broken), "whole": represented(torch.randn(1, 3, 8))}
    found = null_spaces(known, dict.fromkeys(known, torch.float32), 1.0, ALONE)
    assert found["broken"] is None
    assert found["whole"].null_dim == 5
    assert "left out of this teleport" in caplog.text


def test_layers_that_saw_the_same_share_a_decomposition():
    same, other = represented(torch.randn(1, 3, 8)), represented(torch.randn(1, 3, 8))
    known = {"q": same, "o": other, "k": same, "v": same}
    dtypes = dict.fromkeys(known, torch.float32) | {"v": torch.float64}
    found = null_spaces(known, dtypes, 1.0, ALONE)
    assert list(found) == ["q", "o", "k", "v"]
    assert found["k"] is found["q"]
    assert found["o"] is not found["q"]
    assert found["v"].basis.dtype == torch.float64
