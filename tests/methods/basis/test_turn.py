"""Weights, gradients and moments after a turn against the same computed in the old basis, in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_teleport.layers.double import KeepDouble
from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.bases import Random, balance
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.turn import Turn, folded
from hf_teleport.optimizers.state import OptimizerState

from tiny_models import build, loss_fn

NAMES = ["llama", "gpt2", "bert", "t5", "vit"]
BETAS, EPSILON, LR = (0.9, 0.95), 1e-8, 1e-2


def perturbed(name):
    model, batch = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return model.eval(), batch


def found(model, batch):
    with KeepDouble():
        symmetries, _ = find_symmetries(model, loss_fn, batch)
    return [s for s in symmetries if not s.reason]


def turn_of(used, seed=0):
    return Turn({s: balance(s) if s.kind == "scaling" else Random(used, seed).choose(s) for s in used})


def point_of(model, batch):
    with KeepDouble():
        return evaluate(model, loss_fn, batch, seed=0)


def gradients_of(point):
    return {p: g for p, g in zip(point.parameters, point.gradients, strict=True) if g is not None}


def close(a, b, tolerance=1e-9):
    """Two sets of tensors, to a part of the length of all of them."""
    assert a.keys() == b.keys()
    length = math.sqrt(sum(float(t.square().sum()) for t in b.values()))
    return all(float((a[key] - b[key]).norm()) <= tolerance * length for key in b)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_after_a_turn_is_the_turned_gradient_from_before(name):
    model, batch = perturbed(name)
    used = found(model, batch)
    turn = turn_of(used)
    before = point_of(model, batch)
    expected = turn.gradients(gradients_of(before))
    turn.carry_out()
    after = point_of(model, batch)
    gains = {gain for s in used for gain in s.gains}
    assert abs(after.loss - before.loss) < 1e-12
    assert close(expected, {p: g for p, g in gradients_of(after).items() if p not in gains})
    moved = {part.parameter for s in used for part in s.parts}
    unturned = gradients_of(before)
    assert not close({p: unturned[p] for p in moved & expected.keys()}, {p: expected[p] for p in moved & expected.keys()}, 0.1)


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_gains_are_folded_into_weights_gradients_and_first_moments(name):
    model, batch = perturbed(name)
    used = found(model, batch)
    if name == "t5":  # tied: nothing to fold there
        assert not any(s.folds for s in used)
        return
    optimizer = torch.optim.Adam(model.parameters())
    before = gradients_of(point_of(model, batch))
    for parameter, gradient in before.items():
        parameter.grad = gradient.clone()
    optimizer.step()
    # Only the folds: rotations by the identity.
    turn = Turn({s: torch.eye(s.size).double().expand(s.blocks, -1, -1) for s in used if s.folds})
    before = gradients_of(point_of(model, batch))
    gains = {fold.norm.gain: fold.norm.gain.detach().clone() for s in used for fold in s.folds}
    weights = {p: p.detach().clone() for p in model.parameters()}
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in before}
    turn.carry_out(OptimizerState(optimizer))
    after = gradients_of(point_of(model, batch))
    assert gains
    for s in used:
        for fold in s.folds:
            gain, bias = fold.norm.gain, fold.norm.bias
            assert torch.equal(gain, torch.ones_like(gain))
            if bias is not None:
                torch.testing.assert_close(bias.data, weights[bias] / gains[gain])
            for weight, dim, elements in fold.readers:
                shape = [1] * weight.dim()
                shape[dim] = -1
                factors = gains[gain][elements].reshape(shape)
                torch.testing.assert_close(weight.data, weights[weight] * factors)
                torch.testing.assert_close(after[weight], before[weight] / factors, atol=1e-12, rtol=1e-8)
                torch.testing.assert_close(optimizer.state[weight]["exp_avg"], moments[weight] / factors)
    changed = {p for p in weights if not torch.equal(p, weights[p])}
    readers = {weight for s in used for fold in s.folds for weight, _, _ in fold.readers}
    biases = {fold.norm.bias for s in used for fold in s.folds} - {None}
    assert changed == readers | biases | set(gains)


def test_folding_gradients_leaves_the_given_ones_alone():
    model, batch = perturbed("llama")
    used = found(model, batch)
    gradients = gradients_of(point_of(model, batch))
    copies = {p: g.clone() for p, g in gradients.items()}
    turn = turn_of(used)
    turn.gradients(gradients)
    folded({fold: fold.norm.gain.detach() for s in used for fold in s.folds}, gradients)
    assert all(torch.equal(gradients[p], copies[p]) for p in copies)


def test_turns_of_gradients_come_one_after_the_other():
    model, batch = perturbed("gpt2")
    used = found(model, batch)
    gradients = gradients_of(point_of(model, batch))
    first = turn_of(used, 1)
    expected = first.gradients(gradients)
    first.carry_out()
    second = turn_of(used, 2)
    expected = second.gradients(expected)
    second.carry_out()
    assert close(expected, gradients_of(point_of(model, batch)))


# --- Adam ----------------------------------------------------------------------------------------------------------------


class Reference:
    """Adam on turned copies of weights and moments, with gradients of a model that is never turned."""

    def __init__(self, model, turn, undo, state, trained, decay):
        self.model, self.turn, self.undo, self.trained, self.decay = model, turn, undo, trained, decay
        self.weights = {}  # turned
        self.state = state  # by parameter: step, average and average of squares, turned

    def step(self, batch):
        point = point_of(self.model, batch)
        turned = self.turn.gradients(gradients_of(point))
        for p in self.trained:
            step, mean, square = self.state.get(p, (0, torch.zeros_like(p), torch.zeros_like(p)))
            step += 1
            mean = BETAS[0] * mean + (1 - BETAS[0]) * turned[p]
            square = BETAS[1] * square + (1 - BETAS[1]) * turned[p].square()
            self.state[p] = step, mean, square
            self.weights[p] = self.weights[p] * (1 - LR * self.decay)
            scale = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            self.weights[p] -= LR / (1 - BETAS[0] ** step) * mean / scale
        self.undo(self.weights)
        return point.loss


def trainable(model, used):
    """All but the gains in the symmetries that are used."""
    gains = {gain for s in used for gain in s.gains}
    return [p for p in model.parameters() if p not in gains]


@pytest.mark.parametrize(
    ("name", "decay", "steps_before", "squares"),
    [
        ("llama", 0.0, 0, "turn"),
        ("llama", 0.1, 3, "turn"),
        ("gpt2", 0.1, 0, "turn"),
        ("gpt2", 0.0, 3, "turn"),
        ("vit", 0.1, 3, "turn"),
        ("llama", 0.1, 3, "factors"),
        ("gpt2", 0.0, 3, "factors"),
        ("llama", 0.0, 3, "keep"),
    ],
)
def test_adam_after_a_turn_is_adam_in_rotated_coordinates(name, decay, steps_before, squares):
    turned, batch = perturbed(name)
    used = found(turned, batch)
    if name == "llama":
        assert {s.kind for s in used} == {"stream", "value_output", "scaling"}
    trained = trainable(turned, used)
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, eps=EPSILON, weight_decay=decay)

    def step():
        point = point_of(turned, batch)
        for p, g in gradients_of(point).items():
            p.grad = g
        optimizer.step()
        return point.loss

    for _ in range(steps_before):
        step()

    plain = copy.deepcopy(turned)
    twin = dict(zip(turned.parameters(), plain.parameters(), strict=True))
    turn = turn_of(used)
    if squares == "factors":
        turn.shares = {s: torch.rand(s.blocks, s.size).double() for s in used if s.kind != "scaling"}
    averages = turn.gradients({p: kept["exp_avg"] for p, kept in optimizer.state.items()})
    turn.carry_out(OptimizerState(optimizer, "keep" if squares == "keep" else "turn"))
    assert close({p: kept["exp_avg"] for p, kept in optimizer.state.items()}, averages)
    state = {p: (int(kept["step"]), kept["exp_avg"].clone(), kept["exp_avg_sq"].clone()) for p, kept in optimizer.state.items()}
    assert len(state) == (len(trained) if steps_before else 0)

    # Weights go back by the inverse turn of a third model, in which the gains are as the turn has left them.
    third = copy.deepcopy(turned)
    third_of = dict(zip(turned.parameters(), third.parameters(), strict=True))

    class Twin:
        """The turn, with gradients of the plain model."""

        def gradients(self, gradients):
            of = {q: p for p, q in twin.items()}
            return turn.gradients({of[q]: g for q, g in gradients.items()})

    folds = {p: (twin[p].detach().clone(), p.detach().clone()) for p in turned.parameters() if p not in set(trained)}

    def undo(weights):
        kept = {p: p.detach().clone() for p in turned.parameters()}
        with torch.no_grad():
            for p in turned.parameters():
                p.copy_(weights[p] if p in weights else folds[p][1])
            turn.take_back()
            for p, q in twin.items():
                q.copy_(p)
            for p, before in kept.items():
                p.copy_(before)

    reference = Reference(plain, Twin(), undo, state, trained, decay)
    reference.weights = {p: third_of[p].detach().clone() for p in trained}

    losses = []
    for _ in range(20):
        expected = reference.step(batch)
        losses.append(step())
        assert abs(losses[-1] - expected) <= 1e-9 * abs(expected)
        assert close({p: p.detach() for p in trained}, reference.weights)
    assert losses[-1] < 0.9 * losses[0]
    for p, before in folds.items():
        torch.testing.assert_close(twin[p].data, before[0], msg="gains do not train")


def test_a_turn_changes_where_adam_goes_and_sgd_does_not_notice():
    ends = {}
    for turns in (False, True):
        for make in (torch.optim.Adam, torch.optim.SGD):
            model, batch = perturbed("gpt2")
            used = found(model, batch)
            trained = trainable(model, used)
            if turns:
                turn_of(used).carry_out()
            optimizer = make(trained, lr=LR)
            for _ in range(3):
                point = point_of(model, batch)
                for p, g in gradients_of(point).items():
                    p.grad = g
                optimizer.step()
            ends[make, turns] = point_of(model, batch).loss
    assert abs(ends[torch.optim.SGD, True] - ends[torch.optim.SGD, False]) < 1e-10
    assert abs(ends[torch.optim.Adam, True] - ends[torch.optim.Adam, False]) > 1e-4


# --- There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_taking_back_restores_weights_and_first_moments(name):
    model, batch = perturbed(name)
    used = found(model, batch)
    trained = trainable(model, used)
    optimizer = torch.optim.AdamW(trained)
    for p, g in gradients_of(point_of(model, batch)).items():
        p.grad = g
    optimizer.step()
    weights = {p: p.detach().clone() for p in model.parameters()}
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in trained if p in optimizer.state}
    state = OptimizerState(optimizer)
    turn = turn_of(used)
    turn.carry_out(state)
    turn.take_back(state)
    assert all((p - before).abs().max() <= 1e-12 for p, before in weights.items())
    assert all((optimizer.state[p]["exp_avg"] - before).abs().max() <= 1e-12 for p, before in moments.items())


def test_moments_of_gains_are_levelled():
    model, batch = perturbed("llama")
    used = found(model, batch)
    optimizer = torch.optim.AdamW(model.parameters())
    for p, g in gradients_of(point_of(model, batch)).items():
        p.grad = g
    optimizer.step()
    turn_of(used).carry_out(OptimizerState(optimizer))
    gains = {gain for s in used for gain in s.gains}
    assert len(gains) == 5
    for gain in gains:
        kept = optimizer.state[gain]
        assert not kept["exp_avg"].any()
        assert kept["exp_avg_sq"].min() == kept["exp_avg_sq"].max() > 0


def test_weights_keep_their_storage_and_layout():
    model, batch = perturbed("llama")
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.data = weight.T.contiguous().T
    before = {p: (p.data_ptr(), p.stride(), p.dtype) for p in model.parameters()}
    turn_of(found(model, batch)).carry_out()
    assert before == {p: (p.data_ptr(), p.stride(), p.dtype) for p in model.parameters()}


def test_a_turn_of_nothing_does_nothing():
    model = nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    turn = Turn({})
    turn.carry_out()
    assert turn.exact
    gradients = {model.weight: torch.ones(3, 3)}
    assert turn.gradients(gradients) == gradients
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
