import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_teleport.layers.subspace import Representation, Subspace, _gram, core_dims, null_space, rank_tolerance


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


# What is seen without a decomposition.


def rows_with(values, num_rows, width, generator):
    """Float64 rows (G, N, d) with the given singular values (G, r)."""
    left, right = (
        torch.linalg.qr(torch.randn(len(values), size, values.shape[-1], dtype=torch.float64, generator=generator)).Q
        for size in (num_rows, width)
    )
    return (left * values[:, None]) @ right.mT


def counted(representation):
    """How many singular values count in each group, by the decomposition."""
    values, _ = representation.decompose()
    return core_dims(values, 1.0, rank_tolerance(representation_width(representation), representation.dtype))


def representation_width(representation):
    kept = representation.rows if representation.gram is None else representation.gram
    return kept.shape[-1]


@settings(max_examples=200)
@given(
    groups=st.integers(1, 3),
    num_rows=st.integers(1, 30),
    width=st.integers(1, 14),
    weakest=st.one_of(st.floats(0.5, 2), st.floats(0, 1e3), st.sampled_from([0.0, 0.99, 1.0, 1.01, 1e6])),
    middling=st.floats(1e-6, 1),
    scale=st.sampled_from([1e-20, 1e-8, 1.0, 1e8, 1e15]),
    zero_rows=st.booleans(),
    seed=st.integers(0, 999),
)
def test_full_rank_is_never_seen_where_the_decomposition_finds_less(
    groups, num_rows, width, weakest, middling, scale, zero_rows, seed
):
    """Singular values near the tolerance, in one group of several."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(num_rows, width)
    values = torch.full((groups, rank), middling, dtype=torch.float64)
    values[:, 0] = 1
    values[seed % groups, -1] = weakest * rank_tolerance(width, torch.float32) if rank > 1 else 1
    rows = (scale * rows_with(values, num_rows, width, generator)).float()
    if zero_rows:
        rows[:, seed % num_rows] = 0
    representation = representation_of(rows, parts=2)
    if representation.has_full_rank():
        assert (counted(representation) == rank).all()


@given(num_rows=st.integers(1, 40), width=st.integers(1, 20), scale=st.sampled_from([1e-20, 1.0, 1e15]), seed=st.integers(0, 99))
def test_full_rank_is_seen_where_singular_values_are_of_one_size(num_rows, width, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(num_rows, width)
    values = 0.01 + torch.rand(2, rank, dtype=torch.float64, generator=generator)
    rows = (scale * rows_with(values, num_rows, width, generator)).float()
    for kind in (rows, rows[:1], (rows / scale).bfloat16() if rank == 1 else rows):
        assert representation_of(kind).has_full_rank()
    found = null_space(representation_of(rows, parts=3), 1.0, torch.float64)
    assert found.null_dim == 2 * (width - rank)
    assert found.num_rows == num_rows
    expected = torch.stack([dense_projection(group, 1.0)[0] for group in rows])
    torch.testing.assert_close(matrix_of(found), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_rows", [3, 8, 20])
def test_full_rank_is_not_seen_in_what_is_not_finite_or_not_known(num_rows, bad):
    rows = torch.randn(2, num_rows, 8)
    rows[1, 2, 3] = bad
    assert not representation_of(rows).has_full_rank()
    assert not representation_of(torch.zeros(1, num_rows, 8)).has_full_rank()
    assert not representation_of(torch.randn(1, num_rows, 8).double()).has_full_rank()
    assert not Representation().has_full_rank()
    repeated = torch.randn(1, 1, 8).expand(1, num_rows, 8)
    assert not representation_of(repeated).has_full_rank()


def test_full_rank_is_no_matter_below_tau_1():
    assert null_space(representation_of(torch.randn(1, 40, 7)), 0.5).null_dim > 0


@pytest.mark.parametrize("width", [0, 1, 7, 127, 128, 129, 255, 257, 300, 1025, 1030])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_gram_matrix_in_blocks(width, num_rows):
    rows = torch.randn(2, num_rows, width, dtype=torch.float64)
    gram = _gram(rows)
    torch.testing.assert_close(gram, rows.mT @ rows, atol=1e-12, rtol=1e-12)


def test_what_a_projection_leaves_by_rounding_is_zero_and_what_is_small_but_real_stays():
    rows = torch.randn(1, 3, 12)
    for found in (null_space(representation_of(rows), 1.0), null_space(representation_of(torch.cat([rows] * 6, 1)), 1.0)):
        inside = torch.randn(1, 4, 3) @ rows
        assert not found.project(inside).any()
        assert not found.project(torch.zeros(1, 4, 12)).any()
        outside = found.project(torch.randn(1, 4, 12))
        torch.testing.assert_close(found.project(inside + 1e-3 * outside), 1e-3 * outside, atol=1e-5, rtol=0)
