import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_teleport.subspace import Representation, Subspace, core_dims, null_space, rank_tolerance


def representation_of(rows, parts=1):
    representation = Representation()
    for part in rows.tensor_split(parts, dim=1):
        if part.shape[1]:
            representation.add(part)
    return representation


def dense_projection(rows, tau):
    """I - B Bᵀ from the plain SVD of one group's rows, in float64."""
    rows = rows.double()
    _, values, right = torch.linalg.svd(rows)
    energy = values.square()
    rank = int((values > 1e-6 * values.max()).sum()) if values.max() > 0 else 0
    k = rank
    if tau < 1:
        k = min(rank, next(i for i in range(1, len(values) + 1) if energy[:i].sum() >= tau * energy.sum()))
    basis = right[:k].T
    return torch.eye(rows.shape[1], dtype=torch.float64) - basis @ basis.T, rows.shape[1] - k


def matrix_of(subspace: Subspace):
    width = subspace.basis.shape[1]
    return subspace.project(torch.eye(width, dtype=subspace.basis.dtype).expand(len(subspace.basis), -1, -1))


SHAPES = {"fewer rows": (5, 12), "square": (9, 9), "more rows": (40, 7), "one row": (1, 6)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_plain_svd(shape, tau, dtype):
    rows = torch.randn(2, *shape, dtype=dtype)
    found = null_space(representation_of(rows, parts=3), tau)
    expected = [dense_projection(group, tau) for group in rows]
    assert found.null_dim == sum(dim for _, dim in expected)
    assert found.dim == 2 * shape[1]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(matrix_of(found).double(), torch.stack([p for p, _ in expected]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_rows", [6, 50])
def test_rank_deficient_rows(num_rows, dtype):
    rows = (torch.randn(num_rows, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)).to(dtype)[None]
    found = null_space(representation_of(rows), 1.0)
    assert found.null_dim == 7
    weights = torch.randn(1, 4, 10, dtype=dtype)
    assert (found.project(weights) @ rows.mT).abs().max() < (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("num_rows", [3, 30])
@pytest.mark.parametrize("tau", [1.0, 0.9])
def test_all_zero_rows_leave_everything_free(num_rows, tau):
    found = null_space(representation_of(torch.zeros(1, num_rows, 8)), tau)
    assert found.null_dim == 8
    weights = torch.randn(1, 4, 8)
    torch.testing.assert_close(found.project(weights), weights)


def test_a_small_part_in_the_null_space_is_free_of_the_rounding_of_a_large_one_outside():
    rows = torch.randn(1, 3, 12)
    found = null_space(representation_of(rows), 1.0)
    matrix = 1e6 * torch.randn(1, 4, 3) @ rows + torch.randn(1, 4, 12)
    projected = found.project(matrix)
    assert projected.norm() < 10 * 48**0.5
    assert (projected @ rows.mT).norm() < 1e-6 * projected.norm() * rows.norm()


def test_groups_may_have_different_ranks():
    rows = torch.zeros(2, 20, 5, dtype=torch.float64)
    rows[0] = torch.randn(20, 5)
    rows[1, :, 0] = 1.0
    found = null_space(representation_of(rows), 1.0)
    assert found.null_dim == 0 + 4
    torch.testing.assert_close(matrix_of(found)[0], torch.zeros(5, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix_of(found)[1], torch.diag(torch.tensor([0.0, 1, 1, 1, 1])).double())


def test_gram_in_float64_resolves_what_float32_can_hold():
    # A direction 1e-5 as strong as the largest is real in float32; a float32 Gram matrix would lose it.
    rows = torch.randn(200, 8, dtype=torch.float64)
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    values = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1e-5], dtype=torch.float64)
    weak = ((left * values) @ right).float()[None]
    assert null_space(representation_of(weak), 1.0).null_dim == 0
    values[-1] = 1e-8
    assert null_space(representation_of(((left * values) @ right).float()[None]), 1.0).null_dim == 1


def test_the_vector_that_reaches_the_threshold_is_core():
    values = torch.tensor([[3.0, 2.0, 1.0]])  # energies 9, 4, 1 of 14
    assert core_dims(values, 9 / 14, 1e-6).tolist() == [1]
    assert core_dims(values, 9.1 / 14, 1e-6).tolist() == [2]
    assert core_dims(values, 1.0, 1e-6).tolist() == [3]


def test_tolerance_follows_the_precision_and_not_the_number_of_rows():
    assert rank_tolerance(100, torch.float32) == 10 * torch.finfo(torch.float32).eps


def test_nothing_added_is_an_error():
    with pytest.raises(ValueError, match="without rows"):
        Representation().decompose()


@given(
    groups=st.integers(1, 3),
    num_rows=st.integers(1, 30),
    width=st.integers(1, 12),
    tau=st.floats(0.1, 1),
    seed=st.integers(0, 99),
)
def test_is_a_projection_and_the_null_space_is_null(groups, num_rows, width, tau, seed):
    rows = torch.randn(groups, num_rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = null_space(representation_of(rows, parts=2), tau)
    projection = matrix_of(found)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-10, rtol=0)
    torch.testing.assert_close(projection, projection.mT, atol=1e-10, rtol=0)
    assert round(float(projection.diagonal(dim1=-2, dim2=-1).sum())) == found.null_dim
    lost = (rows @ projection).square().sum((-1, -2))
    assert (lost <= (1 - tau) * rows.square().sum((-1, -2)) + 1e-9).all()
