"""Second moments gathered from gradients, against dense sums in float64."""

import pytest
import torch

from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.features import effective
from hf_teleport.methods.basis.moments import Moments, misalignment, shares, turned
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.turn import Turn, folded, slices

from tiny_models import build


def loss_fn(model, batch):
    return model(**batch).loss


def uneven(name):
    """A model with uneven gains, its symmetries, and its gradients on two batches."""
    model, batch = build(name)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    symmetries, _ = find_symmetries(model, loss_fn, batch)
    used = [s for s in symmetries if not s.reason and s.kind != "scaling"]
    gradients = []
    for seed in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * seed)
        gradients.append(evaluate(model, loss_fn, batch, seed=seed).by_parameter)
    return model, used, gradients


def dense(symmetry, gradients, used):
    folds = {fold for other in used for fold in other.folds}
    gains = {fold: effective(fold.norm) for fold in folds}
    total = 0
    for part in symmetry.parts:
        if part.parameter in gradients:
            rows = slices(folded(gains, gradients)[part.parameter], part)
            moment = torch.einsum("hrkn,hrjn->hkj", rows, rows)
            trace = torch.einsum("hkk->h", moment)[:, None, None]
            total = total + torch.where(trace > 0, moment / trace, 0.0)
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_steps_are_summed_with_what_is_left_of_earlier_ones(name):
    _, used, gradients = uneven(name)
    assert any(symmetry.folds for symmetry in used) == (name == "llama")
    moments = Moments(used, decay=0.8)
    for own in gradients:
        moments.look({parameter: 7.0 * gradient for parameter, gradient in own.items()})  # clipped: the scale says nothing
    for symmetry in used:
        first, second = (dense(symmetry, own, used) for own in gradients)
        torch.testing.assert_close(moments.values[symmetry], 0.8 * first + second, atol=1e-9, rtol=1e-9)
    assert moments.looks == 2


def test_a_step_that_is_not_finite_changes_nothing():
    _, used, gradients = uneven("llama")
    moments = Moments(used, decay=0.5)
    moments.look(gradients[0])
    before = {symmetry: value.clone() for symmetry, value in moments.values.items()}
    spoilt = {parameter: gradient.clone() for parameter, gradient in gradients[1].items()}
    for gradient in spoilt.values():
        gradient.view(-1)[0] = float("inf")
    moments.look(spoilt)
    assert all(torch.equal(moments.values[symmetry], before[symmetry]) for symmetry in used)


def test_moments_turn_as_the_gradients_do():
    _, used, gradients = uneven("llama")
    moments, after = Moments(used), Moments(used)
    moments.look(gradients[0])
    generator = torch.Generator().manual_seed(0)
    rotations = {
        s: torch.linalg.qr(torch.randn(s.blocks, s.size, s.size, dtype=torch.float64, generator=generator)).Q for s in used
    }
    turn = Turn(rotations)
    turned_gradients = turn.gradients(gradients[0])
    turn.carry_out()
    after.look(turned_gradients)
    for symmetry in used:
        known = {part.parameter for part in symmetry.parts if part.parameter.dim() > 1}
        if all(part.parameter in known for part in symmetry.parts):
            torch.testing.assert_close(
                turned(moments.values[symmetry], rotations[symmetry]), after.values[symmetry], atol=1e-8, rtol=1e-8
            )


def test_misalignment():
    diagonal = torch.diag(torch.tensor([3.0, 1.0]).double())[None]
    assert misalignment(diagonal) == 0
    quarter = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double()[None] / 2**0.5
    off = turned(diagonal, quarter)
    assert misalignment(off) == pytest.approx(2 / 10)  # off the diagonal stand 1 and 1, on it 2 and 2


def test_a_fiftieth_of_the_shares_is_spread_evenly():
    squares = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    expected = torch.tensor([[0.74, 0.25, 0.005, 0.005], [0.25, 0.25, 0.25, 0.25]]).double()
    torch.testing.assert_close(shares(squares), expected)
    diagonal = torch.diag(torch.tensor([3.0, 1.0]).double())[None]
    torch.testing.assert_close(shares(diagonal.diagonal(dim1=1, dim2=2)), torch.tensor([[0.745, 0.255]]).double())
    quarter = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double()[None] / 2**0.5
    off = turned(diagonal, quarter)
    torch.testing.assert_close(shares(off.diagonal(dim1=1, dim2=2)), torch.tensor([[0.5, 0.5]]).double())


def test_rounding_makes_no_misalignment_negative():
    sizes = torch.arange(2, 400)
    moments = [torch.diag(torch.rand(int(k), generator=torch.Generator().manual_seed(int(k))))[None] for k in sizes]
    unclamped = [float(1 - m.diagonal(dim1=-2, dim2=-1).square().sum() / m.square().sum()) for m in moments]
    assert min(unclamped) < 0  # the case is there
    assert all(0 <= misalignment(moment) < 1e-6 for moment in moments)
