import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.bases import (
    BASES,
    ActivationCovariance,
    GradientMoment,
    PredictedDecrease,
    Random,
    balance,
    mean_free,
)
from hf_teleport.methods.basis.moments import misalignment
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.symmetry import Part, Symmetry
from hf_teleport.methods.basis.turn import Turn, slices
from hf_teleport.weights.ranks import ALONE

from tiny_models import Halves, build, loss_fn


def symmetry_of(blocks, size, centred=False, width=7):
    """A writer and a reader of blocks of features."""
    writer = nn.Parameter(torch.randn(blocks * size, width, dtype=torch.float64))
    reader = nn.Parameter(torch.randn(width + 1, blocks * size, dtype=torch.float64))
    positions = torch.arange(blocks * size).view(blocks, 1, size)
    parts = [Part(writer, 0, positions, False), Part(reader, 1, positions, True)]
    return Symmetry("stream", "writer", blocks, size, centred=centred, parts=parts)


def random_gradients(symmetry):
    return {part.parameter: torch.randn_like(part.parameter) for part in symmetry.parts}


def seen(basis_class, symmetry, gradients=(), seed=0):
    """A basis that has seen gradients only."""
    basis = basis_class([symmetry], seed)
    for own in gradients:
        basis.see(own, None)
    return basis


plain = st.tuples(st.integers(2, 7), st.just(False))
centred = st.tuples(st.integers(2, 7), st.just(True))


@pytest.mark.parametrize("name", ["gradient", "predicted_decrease", "random"])
@given(blocks=st.integers(1, 3), space=plain | centred, seed=st.integers(0, 20))
def test_all_are_orthogonal_and_keep_the_ones_where_a_mean_is_taken(name, blocks, space, seed):
    torch.manual_seed(seed)
    size, centred = space
    symmetry = symmetry_of(blocks, size, centred)
    found = seen(BASES[name], symmetry, [random_gradients(symmetry) for _ in range(2)]).choose(symmetry)
    assert found.shape == (blocks, size, size)
    assert found.dtype == torch.float64
    unit = torch.eye(size, dtype=torch.float64).expand(blocks, -1, -1)
    torch.testing.assert_close(found @ found.mT, unit, atol=1e-10, rtol=0)
    if centred:
        torch.testing.assert_close(found.sum(-1), torch.ones(blocks, size).double(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("basis_class", [GradientMoment, PredictedDecrease, ActivationCovariance])
@pytest.mark.parametrize("centred", [False, True])
def test_what_has_seen_nothing_turns_nothing(basis_class, centred):
    symmetry = symmetry_of(2, 4, centred)
    found = seen(basis_class, symmetry).choose(symmetry)
    torch.testing.assert_close(found, torch.eye(4).double().expand(2, -1, -1))


@given(size=st.integers(1, 12))
def test_mean_free_vectors_are_orthonormal_and_have_no_mean(size):
    found = mean_free(size, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (size, size - 1)
    torch.testing.assert_close(found.T @ found, torch.eye(size - 1).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.zeros(size - 1).double(), atol=1e-12, rtol=0)


# --- Random --------------------------------------------------------------------------------------------------------------


def test_random_rotations_are_those_of_the_seed_and_differ_between_symmetries():
    pair = [symmetry_of(2, 5), symmetry_of(2, 5)]
    found = [[Random(pair, seed).choose(s) for s in pair] for seed in (3, 3, 9)]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.allclose(found[0][0], found[2][0])
    assert not torch.allclose(found[0][0], found[0][1])
    assert not torch.allclose(found[0][0][0], found[0][0][1])


def test_random_rotations_are_uniform():
    found = Random([symmetry_of(4000, 3)], 0)
    matrices = found.choose(found.symmetries[0])
    # Each entry has mean 0 and variance 1/3; reflections are as frequent as rotations.
    assert matrices.mean(0).abs().max() < 0.05
    torch.testing.assert_close(matrices.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.03, rtol=0)
    assert torch.linalg.det(matrices).mean().abs() < 0.05


# --- Gradients -----------------------------------------------------------------------------------------------------------


def dense_moment(symmetry, batches):
    """The sum of the second moments of all axes and batches, each with trace one, for each block."""
    writer, reader = (part.parameter for part in symmetry.parts)
    total = torch.zeros(symmetry.blocks, symmetry.size, symmetry.size, dtype=torch.float64)
    for gradients in batches:
        for matrix in (gradients[writer], gradients[reader].T):
            for block, rows in enumerate(matrix.split(symmetry.size)):
                moment = rows @ rows.T
                total[block] += moment / moment.trace()
    return total


@given(blocks=st.integers(1, 3), size=st.integers(2, 7), seed=st.integers(0, 20))
def test_the_second_moment_is_diagonal_in_the_basis_of_gradients(blocks, size, seed):
    torch.manual_seed(seed)
    symmetry = symmetry_of(blocks, size)
    batches = [random_gradients(symmetry) for _ in range(2)]
    basis = seen(GradientMoment, symmetry, batches)
    moment, found = dense_moment(symmetry, batches), basis.choose(symmetry)
    turned = found @ moment @ found.mT
    diagonal = turned.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), atol=1e-10, rtol=0)
    expected = 1 - moment.diagonal(dim1=-2, dim2=-1).square().sum() / moment.square().sum()
    assert misalignment(basis._moments[symmetry]) == pytest.approx(float(expected))
    # Seen again in the new basis, nothing is left off the diagonal.
    again = seen(GradientMoment, symmetry, [Turn({symmetry: found}).gradients(own) for own in batches])
    assert abs(misalignment(again._moments[symmetry])) < 1e-10


def test_where_a_mean_is_taken_it_is_diagonal_among_vectors_without_one():
    symmetry = symmetry_of(2, 6, centred=True)
    batches = [random_gradients(symmetry)]
    found = seen(GradientMoment, symmetry, batches).choose(symmetry)
    turned, inside = found @ dense_moment(symmetry, batches) @ found.mT, mean_free(6, found)
    rest = inside.T @ turned @ inside
    torch.testing.assert_close(rest, torch.diag_embed(rest.diagonal(dim1=-2, dim2=-1)), atol=1e-10, rtol=0)


def test_a_turn_ends_misalignment_on_a_model_with_gains():
    model, batch = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    symmetries, _ = find_symmetries(model.eval(), loss_fn, batch)
    used = [s for s in symmetries if not s.reason and s.kind != "scaling"]
    measured = []
    basis = None
    for turns in range(2):
        if turns:
            Turn({s: basis.choose(s) for s in used}).carry_out()
        basis = GradientMoment(used, 0)
        basis.observe(evaluate(model, loss_fn, batch, seed=0))
        measured.append([misalignment(basis._moments[s]) for s in used])
    assert min(measured[0]) > 0.05
    assert max(measured[1]) < 1e-4


# --- The predicted decrease ----------------------------------------------------------------------------------------------


@given(blocks=st.integers(1, 3), space=plain | centred, seed=st.integers(0, 50), calls=st.integers(1, 3))
def test_the_sum_of_absolute_gradients_never_shrinks(blocks, space, seed, calls):
    torch.manual_seed(seed)
    symmetry = symmetry_of(blocks, *space)
    batches = [random_gradients(symmetry) for _ in range(calls)]
    found = seen(PredictedDecrease, symmetry, batches).choose(symmetry)
    for block in range(blocks):
        rows = torch.cat([slices(sum(own[p.parameter] for own in batches), p)[block, 0] for p in symmetry.parts], -1)
        assert (found[block] @ rows).abs().sum() >= rows.abs().sum() * (1 - 1e-12)


def test_the_sum_of_absolute_gradients_grows_on_a_gradient_that_lies_badly():
    symmetry = symmetry_of(1, 4)
    gradients = {part.parameter: torch.zeros_like(part.parameter) for part in symmetry.parts}
    writer = symmetry.parts[0].parameter
    gradients[writer][1] = 1  # one row has it all; spread over four its sum is twice as large
    gradients[writer][0] = 1e-3 * torch.randn(7)
    found = seen(PredictedDecrease, symmetry, [gradients]).choose(symmetry)[0]
    assert (found @ gradients[writer]).abs().sum() > 1.2 * gradients[writer].abs().sum()


# --- Activations ---------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def squared(model, x):
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("norm", [None, nn.RMSNorm(6), nn.LayerNorm(6)], ids=["plain", "rms_norm", "layer_norm"])
def test_the_inputs_of_a_reader_are_uncorrelated_in_the_basis_of_activations(norm):
    model, x = Chain(norm).double(), torch.randn(4, 7, 5).double()
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.add_(torch.rand_like(parameter))
    symmetries, _ = find_symmetries(model, squared, x)
    (symmetry,) = (s for s in symmetries if not s.reason)
    basis = ActivationCovariance([symmetry], 0)
    basis.observe(evaluate(model, squared, x, seed=0))
    basis.merge(ALONE)
    before = misalignment(basis._moments[symmetry])
    Turn({symmetry: basis.choose(symmetry)}).carry_out()
    rows = model.norm(model.a(x)).flatten(0, 1)  # gains are folded now
    moment = rows.T @ rows
    if symmetry.centred:
        inside = mean_free(6, moment)
        moment = inside.T @ moment @ inside
    off = moment - torch.diag(moment.diagonal())
    assert off.norm() < 1e-8 * moment.norm()
    assert before > 0.01


# --- Factors -------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((5, 8), (5, 8), (8, 3)))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_balanced_units_are_written_and_read_with_equal_lengths():
    model, x = Gated().double(), torch.randn(9, 5).double()
    with torch.no_grad():
        model.up.weight.mul_(torch.logspace(-3, 3, 8).double()[:, None])
    symmetries, _ = find_symmetries(model, squared, x)
    (symmetry,) = (s for s in symmetries if not s.reason)
    assert symmetry.kind == "scaling"
    before, gate = model(x), model.gate.weight.clone()
    product = model.up.weight.norm(dim=1) * model.down.weight.norm(dim=0)
    Turn({symmetry: balance(symmetry)}).carry_out()
    torch.testing.assert_close(model.up.weight.norm(dim=1), model.down.weight.norm(dim=0))
    torch.testing.assert_close(model.up.weight.norm(dim=1).square(), product)
    assert (model(x) - before).norm() < 1e-12 * before.norm()
    assert torch.equal(model.gate.weight, gate)


def test_units_that_nothing_reads_or_writes_are_left_alone():
    model, x = Gated().double(), torch.randn(9, 5).double()
    with torch.no_grad():
        model.down.weight[:, 2].zero_()
        model.up.weight[4].zero_()
    symmetries, _ = find_symmetries(model, squared, x)
    (symmetry,) = (s for s in symmetries if not s.reason)
    factors = balance(symmetry).flatten()
    assert factors[2] == factors[4] == 1
    assert (factors > 0).all()
    assert factors.isfinite().all()


@pytest.mark.parametrize("centred", [False, True])
def test_whatever_sign_a_decomposition_gives_is_made_the_same(monkeypatch, centred):
    torch.manual_seed(0)
    symmetry, eigh = symmetry_of(2, 12, centred), torch.linalg.eigh
    basis = seen(GradientMoment, symmetry, [random_gradients(symmetry)])
    expected = basis.choose(symmetry)

    def with_other_signs(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.rand(vectors.shape[0], 1, vectors.shape[2]) < 0.5, -1, 1)

    monkeypatch.setattr(torch.linalg, "eigh", with_other_signs)
    for _ in range(3):
        assert torch.equal(basis.choose(symmetry), expected)


def test_features_without_a_gradient_stay():
    symmetry = symmetry_of(2, 5)
    gradients = {part.parameter: torch.zeros_like(part.parameter) for part in symmetry.parts}
    found = seen(GradientMoment, symmetry, [gradients]).choose(symmetry)
    assert torch.equal(found, torch.eye(5, dtype=torch.float64).expand(2, -1, -1))


def test_a_gain_that_two_symmetries_fold_counts_once():
    """In later events each symmetry has a copy of the fold."""
    model, x = Halves(nn.RMSNorm(8)).double(), torch.randn(6, 5).double()
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    found, _ = find_symmetries(model, squared, x)
    first = [symmetry for symmetry in found if not symmetry.reason and symmetry.folds]
    assert len(first) == 2
    point = evaluate(model, squared, x, seed=0)
    chosen = []
    for symmetries in (first, [symmetry.of(lambda parameter: parameter) for symmetry in first]):
        basis = PredictedDecrease(symmetries, 0)
        basis.observe(point)
        chosen.append([basis.choose(symmetry) for symmetry in symmetries])
    for one, other in zip(*chosen, strict=True):
        assert torch.equal(one, other)
