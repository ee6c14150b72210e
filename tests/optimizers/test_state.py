import pytest
import torch
import transformers.optimization as hf
from accelerate import Accelerator
from torch import nn, optim

from hf_teleport.methods.basis.symmetry import Part, Symmetry
from hf_teleport.methods.basis.turn import Turn, turn_axis
from hf_teleport.optimizers.parts import keeps_copies, unwrapped
from hf_teleport.optimizers.state import OptimizerState, check_optimizer, forget


class SignOfAverage(optim.Optimizer):
    """Keeps an average of gradients and nothing else, as Lion does."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                average.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.sub_(group["lr"] * average.sign())


class Unknown(SignOfAverage):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["hessian"] = p.grad * p.grad.roll(1, 0)


class NeedsMore(SignOfAverage):
    def __init__(self, params, lr, engine):
        super().__init__(params, lr)


# First moments, second moments by name with the axes that they have.
OPTIMIZERS = {
    "AdamW": (optim.AdamW, {"exp_avg"}, {"exp_avg_sq"}),
    "amsgrad": (lambda p: optim.AdamW(p, amsgrad=True), {"exp_avg"}, {"exp_avg_sq", "max_exp_avg_sq"}),
    "Adagrad": (optim.Adagrad, set(), {"sum"}),
    "RMSprop": (lambda p: optim.RMSprop(p, momentum=0.9), {"momentum_buffer"}, {"square_avg"}),
    "NAdam": (optim.NAdam, {"exp_avg"}, {"exp_avg_sq"}),
    "RAdam": (optim.RAdam, {"exp_avg"}, {"exp_avg_sq"}),
    "Adafactor of torch": (optim.Adafactor, set(), {"row_var", "col_var"}),
    "Adafactor": (hf.Adafactor, set(), {"exp_avg_sq_row", "exp_avg_sq_col"}),
    "Adafactor with momentum": (
        lambda p: hf.Adafactor(p, lr=1e-3, relative_step=False, beta1=0.9),
        {"exp_avg"},
        {"exp_avg_sq_row", "exp_avg_sq_col"},
    ),
    "sign": (SignOfAverage, {"exp_avg"}, set()),
    "Lion": (lambda p: pytest.importorskip("pytorch_optimizer").Lion(p), {"exp_avg"}, set()),
}
AXES = {"row_var": 0, "exp_avg_sq_row": 0, "col_var": 1, "exp_avg_sq_col": 1}
"""The one axis of the weight that a factor of its second moment has."""
OF_STEPS = {"RMSprop", "Adafactor with momentum"}
"""Their momentum is an average of steps, which are as long whatever the gradient's size is."""


def trained(make, weight=None, steps=3):
    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64)) if weight is None else weight
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    return weight, optimizer


def kept(optimizer, weight):
    return {k: v.clone() for k, v in optimizer.state[weight].items() if torch.is_tensor(v) and v.numel() > 1}


def rotation(blocks, size):
    return torch.linalg.qr(torch.randn(blocks, size, size, dtype=torch.float64)).Q


def part_of(weight, dim, blocks=1):
    """All features along an axis, in interleaved blocks."""
    size = weight.shape[dim] // blocks
    return Part(weight, dim, torch.arange(blocks * size).reshape(size, 1, blocks).transpose(0, 2), False)


def dense(part, matrices, width):
    """The same as one matrix over the whole axis."""
    matrix = torch.eye(width, dtype=torch.float64)
    for block, positions in zip(matrices, part.positions[:, 0], strict=True):
        matrix[positions[:, None], positions] = block
    return matrix


@pytest.mark.parametrize(("dim", "blocks"), [(0, 1), (0, 2), (0, 3), (1, 1)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_averages_turn_and_those_of_squares_by_the_squared_matrix(kind, dim, blocks):
    make, first, second = OPTIMIZERS[kind]
    weight, optimizer = trained(make)
    before = kept(optimizer, weight)
    assert set(before) == first | second
    part, matrices = part_of(weight, dim, blocks), rotation(blocks, weight.shape[dim] // blocks)
    matrix = dense(part, matrices, weight.shape[dim])
    OptimizerState(optimizer).turn(part, matrices, turn_axis)
    for name, tensor in kept(optimizer, weight).items():
        own = matrix if name in first else matrix.square()
        if name in AXES:
            vector = before[name].flatten()
            expected = (own @ vector if AXES[name] == dim else vector).view_as(tensor)
        else:
            expected = own @ before[name] if dim == 0 else before[name] @ own.T
        torch.testing.assert_close(tensor, expected.to(tensor), atol=1e-6 if tensor.dtype != torch.float64 else 1e-13, rtol=1e-6)
        if name in second:
            torch.testing.assert_close(tensor.sum(), before[name].sum())
            assert (tensor >= 0).all()
            assert (name in AXES and AXES[name] != dim) or not torch.allclose(tensor, before[name])


@pytest.mark.parametrize("rule", ["factors", "turn", "keep"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_rule_on_both_axes_is_that_of_dense_matrices(kind, rule):
    """A whole turn: two blocks along the first axis, one along the second, each rule as one matrix for each axis."""
    make, first, second = OPTIMIZERS[kind]
    weight, optimizer = trained(make)
    values, before = weight.detach().clone(), kept(optimizer, weight)
    turn, of_gradient, of_squares = Turn({}), [], []
    for dim, blocks in ((0, 2), (1, 1)):
        size = weight.shape[dim] // blocks
        part, matrices = part_of(weight, dim, blocks), rotation(blocks, size)
        symmetry = Symmetry("chain", f"axis {dim}", blocks, size, parts=[part])
        turn.rotations[symmetry] = matrices
        shares = torch.rand(blocks, size, dtype=torch.float64)
        shares /= shares.sum(-1, keepdim=True)
        if rule == "factors":
            turn.shares[symmetry] = shares
        # Each coordinate gets its share of the sum over its block.
        spread = shares[:, :, None].expand(-1, -1, size)
        whole = weight.shape[dim]
        of_gradient.append(dense(part, matrices, whole))
        own = {"factors": spread, "turn": matrices.square(), "keep": torch.eye(size).double().expand(blocks, -1, -1)}
        of_squares.append(dense(part, own[rule], whole))
    turn.carry_out(OptimizerState(optimizer, "keep" if rule == "keep" else "turn"))
    torch.testing.assert_close(weight.detach(), of_gradient[0] @ values @ of_gradient[1].T)
    after = kept(optimizer, weight)
    assert set(after) == first | second
    for name, tensor in after.items():
        left, right = of_gradient if name in first else of_squares
        if name in AXES:
            expected = ((left, right)[AXES[name]] @ before[name].double().flatten()).view_as(tensor)
        else:
            expected = left @ before[name].double() @ right.T
        torch.testing.assert_close(tensor, expected.to(tensor), atol=1e-6 if tensor.dtype != torch.float64 else 1e-13, rtol=1e-6)


def test_steps_are_counted_on():
    weight, optimizer = trained(optim.AdamW)
    OptimizerState(optimizer).turn(part_of(weight, 0), rotation(1, 6), turn_axis)
    assert optimizer.state[weight]["step"] == 3


def test_biases_turn_too():
    weight, optimizer = trained(optim.AdamW, nn.Parameter(torch.randn(6, dtype=torch.float64)))
    before, matrices = kept(optimizer, weight), rotation(1, 6)
    OptimizerState(optimizer).turn(part_of(weight, 0), matrices, turn_axis)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], matrices[0] @ before["exp_avg"])
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], matrices[0].square() @ before["exp_avg_sq"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_scaling_of_gradients(kind, dim):
    make, first, _ = OPTIMIZERS[kind]
    weight, optimizer = trained(make)
    before = kept(optimizer, weight)
    factors = 0.5 + torch.rand(weight.shape[dim], dtype=torch.float64)
    OptimizerState(optimizer).scale(weight, dim, factors)
    for name, tensor in kept(optimizer, weight).items():
        own = factors if name in first else factors.square()
        if name in first and kind in OF_STEPS:
            own = torch.ones_like(own)
        if name in AXES:
            expected = (before[name].flatten() * (own if AXES[name] == dim else 1)).view_as(tensor)
        else:
            expected = before[name] * (own[:, None] if dim == 0 else own)
        torch.testing.assert_close(tensor, expected.to(tensor))


def test_a_weight_without_state_gets_none():
    weight, optimizer = trained(optim.AdamW, steps=0)
    state = OptimizerState(optimizer)
    state.turn(part_of(weight, 0), rotation(1, 6), turn_axis)
    state.level(weight)
    state.put_shares(part_of(weight, 0), torch.full((1, 6), 1 / 6))
    assert not optimizer.state.get(weight)
    assert state.tensors(weight) == []


@pytest.mark.parametrize("make", [optim.AdamW, optim.Adagrad, optim.SGD, optim.Adamax, optim.RMSprop, OPTIMIZERS["Adafactor"][0]])
def test_what_was_forgotten_starts_as_if_new(make):
    weights = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)]
    optimizer = make(weights)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    before = kept(optimizer, weights[1])
    forget(optimizer, weights[:1])
    assert all(torch.equal(value, before[name]) for name, value in kept(optimizer, weights[1]).items())
    fresh = nn.Parameter(weights[0].detach().clone())
    weights[0].grad = fresh.grad = torch.randn(6, 5)
    optimizer.step()
    make([fresh]).step()
    assert torch.equal(weights[0], fresh)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_squares_are_spread_along_turned_axes_as_measured(dims):
    weight, optimizer = trained(lambda p: optim.AdamW(p, amsgrad=True))
    before = kept(optimizer, weight)
    shares = {dim: torch.rand(weight.shape[dim], dtype=torch.float64) for dim in dims}
    shares = {dim: share / share.sum() for dim, share in shares.items()}
    for dim, share in shares.items():
        OptimizerState(optimizer).put_shares(part_of(weight, dim), share[None])
    after = kept(optimizer, weight)
    assert torch.equal(after["exp_avg"], before["exp_avg"])
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        expected = before[name].sum(dims, keepdim=True)
        for dim, share in shares.items():
            expected = expected * (share[:, None] if dim == 0 else share)
        torch.testing.assert_close(after[name], expected)
        torch.testing.assert_close(after[name].sum(), before[name].sum())


def test_squares_are_spread_within_each_block_and_copy():
    weight, optimizer = trained(optim.AdamW)
    before = kept(optimizer, weight)["exp_avg_sq"]
    # Two blocks of one feature pair each, the first with two copies: 0 1 and 4 5; the second 2 3 alone would be another part.
    part = Part(weight, 0, torch.tensor([[[0, 1], [4, 5]]]), False)
    OptimizerState(optimizer).put_shares(part, torch.tensor([[0.25, 0.75]]))
    expected = before.clone()
    for first, second in ((0, 1), (4, 5)):
        total = before[first] + before[second]
        expected[first], expected[second] = 0.25 * total, 0.75 * total
    torch.testing.assert_close(kept(optimizer, weight)["exp_avg_sq"], expected)


@pytest.mark.parametrize(
    ("make", "row", "column"), [(hf.Adafactor, "exp_avg_sq_row", "exp_avg_sq_col"), (optim.Adafactor, "row_var", "col_var")]
)
def test_a_factor_of_the_squares_is_spread_along_its_own_axis(make, row, column):
    weight, optimizer = trained(make)
    before, share = kept(optimizer, weight), torch.tensor([0.1, 0.2, 0.3, 0.1, 0.1, 0.2])
    OptimizerState(optimizer).put_shares(part_of(weight, 0), share[None])
    after = kept(optimizer, weight)
    torch.testing.assert_close(after[row].flatten(), (before[row].sum() * share).to(before[row]))
    assert torch.equal(after[column], before[column])


def test_the_largest_gradients_of_adamax_are_spread_as_squares():
    weight, optimizer = trained(optim.Adamax)
    before, share = kept(optimizer, weight)["exp_inf"], torch.tensor([0.1, 0.2, 0.3, 0.1, 0.1, 0.2]).double()
    OptimizerState(optimizer).put_shares(part_of(weight, 0), share[None])
    expected = before.square().sum(0, keepdim=True) * share[:, None]
    torch.testing.assert_close(kept(optimizer, weight)["exp_inf"].square(), expected)


def test_levelled_is_no_average_and_the_mean_of_the_squares():
    gain, optimizer = trained(optim.AdamW, nn.Parameter(torch.randn(6, dtype=torch.float64)))
    before = kept(optimizer, gain)
    OptimizerState(optimizer).level(gain)
    assert not optimizer.state[gain]["exp_avg"].any()
    torch.testing.assert_close(optimizer.state[gain]["exp_avg_sq"], before["exp_avg_sq"].mean().expand(6))


# --- Which optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_known_optimizers_are_accepted_before_their_first_step(kind):
    weight, optimizer = trained(OPTIMIZERS[kind][0], steps=0)
    before = kept(optimizer, weight) if weight in optimizer.state else {}  # Adagrad begins with its sums
    check_optimizer(optimizer)
    after = kept(optimizer, weight) if weight in optimizer.state else {}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


class Descent(optim.SGD):
    pass


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), optim.Muon, Descent, optim.ASGD])
@pytest.mark.parametrize("reset", [False, True])
def test_optimizers_that_no_basis_matters_to_are_declined(make, reset):
    _, optimizer = trained(make, nn.Parameter(torch.randn(6, 5)), steps=0)
    with pytest.raises(ValueError, match="its steps are the same in every basis") as error:
        check_optimizer(optimizer, reset=reset)
    assert type(optimizer).__name__ in str(error.value)
    assert "AdamW" in str(error.value)
    assert "null_space" in str(error.value)


def test_an_unknown_state_is_declined_before_training_with_the_way_out():
    _, optimizer = trained(Unknown, steps=0)
    with pytest.raises(ValueError, match="it keeps hessian, for which there is no rule") as error:
        check_optimizer(optimizer)
    assert "Unknown" in str(error.value)
    assert "teleport_optimizer_state='reset'" in str(error.value)
    check_optimizer(optimizer, reset=True)


def test_what_a_constructor_needs_beside_the_options_is_taken_from_the_optimizer():
    weight, optimizer = trained(lambda p: NeedsMore(p, 0.1, None))
    check_optimizer(optimizer)
    before, matrices = kept(optimizer, weight), rotation(1, 6)
    OptimizerState(optimizer).turn(part_of(weight, 0), matrices, turn_axis)
    torch.testing.assert_close(kept(optimizer, weight)["exp_avg"], matrices[0] @ before["exp_avg"])


def test_wrapped_by_accelerate():
    weight, plain = trained(optim.AdamW)
    wrapped = Accelerator(cpu=True).prepare_optimizer(plain)
    assert wrapped is not plain
    assert unwrapped(wrapped) is plain
    check_optimizer(wrapped)
    before, matrices = kept(plain, weight), rotation(1, 6)
    OptimizerState(wrapped).turn(part_of(weight, 0), matrices, turn_axis)
    torch.testing.assert_close(plain.state[weight]["exp_avg"], matrices[0] @ before["exp_avg"])


class ScheduleFree(optim.SGD):
    """As those optimizers do: a copy of the weights, and a switch."""

    def train(self):
        pass

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("z", parameter.detach().clone()).sub_(parameter.grad)


class Lookahead(optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


@pytest.mark.parametrize("reset", [False, True])
def test_copies_of_the_weights_are_noticed(reset):
    weight = nn.Parameter(torch.randn(3, 3))
    plain = optim.AdamW([weight])
    for optimizer in (ScheduleFree([weight], lr=0.1), Lookahead(plain)):
        assert keeps_copies(optimizer)
        with pytest.raises(ValueError, match=r"keep copies of the weights.*AdamW"):
            check_optimizer(optimizer, reset=reset)
    assert not keeps_copies(plain)
    assert not keeps_copies(Accelerator().prepare(plain))


def test_a_copy_of_the_weights_is_dropped_and_not_zeroed():
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = ScheduleFree([weight], lr=0.1)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    forget(optimizer, [weight])
    assert weight not in optimizer.state
