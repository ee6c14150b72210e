"""Level set teleportation: against dense solutions in float64, and on real rows and a Transformers model."""

import copy
import io
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.hessian import hessian_vector_product
from hf_teleport.layers.point import evaluate
from hf_teleport.methods import METHODS, LevelSet, Move
from hf_teleport.methods.level_set import linearised_step, merit

from tiny_models import build, loss_fn
from tiny_runs import flat, gpt2, make, teleports

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


class Weights(nn.Module):
    """A vector of weights, for losses that are functions of it."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def rosenbrock(model, batch=None):
    x, y = model.w
    return (1 - x) ** 2 + 10 * (y - x**2) ** 2


def quadratic(model, batch=None):
    return 0.5 * (model.w**2 * torch.tensor([1.0, 4.0, 9.0])).sum()


def net(width=6):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()


def rows(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def config(**settings):
    return TeleportConfig(method="level_set", **settings)


def begun(model, loss, batch=None, **settings):
    """A method in its turn on one batch, and where it stands."""
    method = LevelSet(model, loss, config(**settings))
    point = method.evaluate(batch, 0)
    method.survey(point)
    method.fit()
    return method, point


def hessian_of(model, batch):
    """The Hessian times the gradient."""
    point = evaluate(model, cross_entropy, batch, seed=0, differentiable_gradients=True)
    return hessian_vector_product(point, point.gradients)


def climbed(model, loss, steps, batch=None, **settings):
    """The points of a climb, and for each step the penalty under which it was accepted."""
    method, point = begun(model, loss, batch, **settings)
    points, penalties = [point], []
    while len(penalties) < steps and (move := method.propose(points[-1])):
        penalties.append(method._gammas[0])
        move(1.0)
        points.append(method.evaluate(batch, 0))
    return points, penalties


# --- The product and the step ---------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 9), st.floats(0, 10), st.integers(0, 2**16))
def test_the_step_solves_the_conditions_of_the_quadratic_programme(losses, more, rho, seed):
    generator = torch.Generator().manual_seed(seed)
    split = [1, losses, more]
    size = sum(split)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    start, q, jacobian, excesses = draw(size), draw(size), draw(losses, size), draw(losses)
    parameters = [nn.Parameter(part.clone()) for part in start.split(split)]
    step = linearised_step(parameters, list(q.split(split)), [list(g.split(split)) for g in jacobian], excesses.tolist())
    step.add(rho)
    # d + rho Jᵀ lambda = rho q and J d = -c.
    conditions = torch.zeros(size + losses, size + losses, dtype=torch.float64)
    conditions[:size, :size] = torch.eye(size)
    conditions[:size, size:] = jacobian.T
    conditions[size:, :size] = jacobian
    dense = torch.linalg.solve(conditions, torch.cat([rho * q, -excesses]))[:size]
    moved = torch.cat([p.detach() for p in parameters]) - start
    tolerance = 1e-10 * torch.linalg.cond(jacobian) ** 2 * (1 + dense.norm())
    assert (moved - dense).norm() <= tolerance
    assert step.slope >= 0
    # The penalty makes every such step one of ascent.
    if excesses.abs().sum() > 1e-8:
        assert step.predicted(rho, step.penalty()) > 0


def test_a_loss_twice_is_as_once():
    q, g = [torch.randn(4).double(), torch.randn(3).double()], [torch.randn(4).double(), torch.randn(3).double()]
    moved = []
    for times in (1, 2):
        parameters = [nn.Parameter(torch.zeros(4).double()), nn.Parameter(torch.zeros(3).double())]
        linearised_step(parameters, q, [g] * times, [0.3] * times).add(0.5)
        moved.append(torch.cat([p.detach() for p in parameters]))
    assert (moved[0] - moved[1]).norm() <= 1e-12 * moved[0].norm()


def test_predicted_is_the_derivative_of_the_merit_function():
    model = Weights(-0.5, 0.7)
    level, rho, gamma, epsilon = 3.0, 0.2, 0.4, 1e-6
    method, point = begun(model, rosenbrock)
    method._batches[0] = None, level
    product = [p / point.grad_norm**2 for p in hessian_vector_product(point, point.gradients)]
    step = linearised_step([model.w], product, [[point.gradients[0].detach()]], [point.loss - level])
    values = []
    for fraction in (-epsilon, 2 * epsilon):
        step.add(rho, fraction)
        there = method.evaluate(None, 0)
        values.append(merit(there.grad_norm, abs(there.loss - level), gamma))
    assert (values[1] - values[0]) / (2 * epsilon) == pytest.approx(step.predicted(rho, gamma), rel=1e-6)


# --- Climbs with a known end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(-0.9, 0.6), (0.4, 0.5), (1.2, 1.9)])
def test_rosenbrock_ends_at_the_steepest_place_of_its_level_set(start):
    model = Weights(*start)
    points, _ = climbed(model, rosenbrock, 400, step_size="fixed", learning_rate=0.5, max_loss_change=None)
    level = points[0].loss
    # The whole level set: 1 - x and sqrt(10) (y - x²) lie on a circle.
    angle = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    x = 1 - level**0.5 * angle.cos()
    y = x**2 + (level / 10) ** 0.5 * angle.sin()
    squares = (2 * (1 - x) + 40 * x * (y - x**2)) ** 2 + (20 * (y - x**2)) ** 2
    higher = (squares > squares.roll(1)) & (squares >= squares.roll(-1))
    peaks = torch.stack([x, y], 1)[higher]
    distances = (peaks - model.w.detach()).norm(dim=1)
    assert distances.min() < 2e-2
    assert points[-1].grad_norm == pytest.approx(float(squares[higher][distances.argmin()] ** 0.5), rel=1e-5)
    assert points[-1].grad_norm > 1.1 * points[0].grad_norm
    assert points[-1].loss == pytest.approx(level, rel=1e-6)
    assert len(points) < 400, "it did not stop by itself"


def test_a_quadratic_ends_along_the_sharpest_eigenvector():
    model = Weights(2.0, 0.5, 0.1)
    points, _ = climbed(model, quadratic, 200, step_size="fixed", learning_rate=1.0, max_loss_change=None)
    assert points[-1].loss == pytest.approx(points[0].loss, rel=1e-6)
    assert points[-1].grad_norm == pytest.approx((2 * 9 * points[0].loss) ** 0.5, rel=1e-5)
    assert len(points) < 200


@pytest.mark.parametrize("settings", [{}, {"step_size": "fixed", "learning_rate": 2.0}, {"learning_rate": 3.0}])
@pytest.mark.parametrize("problem", ["rosenbrock", "net"])
def test_the_merit_function_never_falls_and_its_penalty_neither(problem, settings):
    model, loss, batch = (Weights(-0.9, 0.6), rosenbrock, None) if problem == "rosenbrock" else (net(), cross_entropy, rows())
    points, penalties = climbed(model, loss, 20, batch, max_loss_change=None, **settings)
    level = points[0].loss
    assert len(penalties) > 5
    assert penalties == sorted(penalties)
    for (before, after), gamma in zip(itertools.pairwise(points), penalties, strict=True):
        values = [merit(point.grad_norm, abs(point.loss - level), gamma) for point in (before, after)]
        assert values[1] > values[0]


def test_proposing_leaves_every_weight_as_it_was():
    model, batch = net(), rows()
    before = copy.deepcopy(model.state_dict())
    method, point = begun(model, cross_entropy, batch)
    assert method.propose(point) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_a_move_is_half_of_it():
    method, point = begun(model := net(), cross_entropy, rows())
    start, move = flat(model), method.propose(point)
    lengths = []
    for fraction in (0.0, 0.5, 0.5):
        move(fraction)
        lengths.append(float((flat(model) - start).norm()))
    assert lengths[0] == 0 < lengths[1]
    assert lengths[2] == pytest.approx(2 * lengths[1], rel=1e-12)


def test_the_learning_rate_is_a_share_of_the_weights_or_the_rate_itself():
    model, batch = net(), rows()
    start = flat(model)
    moved = {}
    for step_size in ("relative", "fixed"):
        method, point = begun(model, cross_entropy, batch, step_size=step_size, learning_rate=1e-3)
        method.propose(point)(1.0)
        moved[step_size] = flat(model) - start
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    assert moved["relative"].norm() == pytest.approx(1e-3 * float(start.norm()), rel=1e-9)
    g, product = (torch.cat([t.detach().flatten() for t in ts]) for ts in (point.gradients, hessian_of(model, batch)))
    tangent = (product - g * (product @ g) / (g @ g)) / (g @ g)
    assert (moved["fixed"] - 1e-3 * tangent).norm() <= 1e-9 * moved["fixed"].norm()


def test_a_step_that_breaks_the_linearisation_is_shortened_before_it_is_made(monkeypatch):
    model, batch = net(), rows()
    before = evaluate(model, cross_entropy, batch, seed=0)
    fractions, lengths = [], []

    class Watched(LevelSet):
        def propose(self, point):
            move, start = super().propose(point), flat(self.model)

            def watched(fraction):
                fractions.append(fraction)
                move(fraction)
                lengths.append(float((flat(self.model) - start).norm() / start.norm()))

            return move and Move(watched, self.snapshot)

    monkeypatch.setitem(METHODS, "level_set", Watched)
    report = Teleporter(model, config(learning_rate=5.0, max_growth=None)).teleport([batch], cross_entropy)
    assert report.steps > 1
    assert set(fractions) == {1.0}
    assert max(lengths) < 1.0  # 5 times the norm of the weights was asked for
    assert report.grad_norm_after > 1.2 * before.grad_norm
    assert abs(report.loss_after - before.loss) <= 0.01 * before.loss


# --- Events ---------------------------------------------------------------------------------------------------------------


def mnist(count):
    """The first digits, flat, and their labels."""
    table = parquet.read_table(SHARED / "mnist" / "train.parquet").slice(0, count).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])), dtype=float).ravel() for row in table]
    pixels = torch.tensor(np.stack(images))
    return (pixels - pixels.mean()) / pixels.std(), torch.tensor([row["label"] for row in table])


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason=f"needs the MNIST files in {SHARED}")
def test_real_rows_keep_every_batch_and_the_gradient_grows():
    images, labels = mnist(64)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    batches = [(images[i::4], labels[i::4]) for i in range(4)]

    def event(**settings):
        model = copy.deepcopy(fresh)
        before = [cross_entropy(model, batch).item() for batch in batches]
        report = Teleporter(model, config(**settings)).teleport(batches, cross_entropy)
        after = [cross_entropy(model, batch).item() for batch in batches]
        return report, max(abs(b - a) / a for a, b in zip(before, after, strict=True))

    joint, drift = event()
    assert joint.grad_norm_after > 1.5 * joint.grad_norm_before
    assert drift <= 0.01
    assert all(layer.moved for layer in joint.layers)
    # Each batch by itself breaks the others.
    assert event(scope="batch", max_loss_change=None)[1] > 0.05


def test_gpt2_moves_all_its_weights():
    model, batch = build("gpt2")
    assert model.config._attn_implementation == "sdpa"
    start = copy.deepcopy(model)
    report = Teleporter(model, config(steps_per_batch=20)).teleport([batch], loss_fn)
    assert report.stopped_because == "max_growth"
    assert report.grad_norm_after >= 2 * report.grad_norm_before
    assert abs(report.loss_after - report.loss_before) <= 0.01 * report.loss_before
    assert {"norm", "embedding"} <= {layer.role for layer in report.layers if layer.moved}
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_what_is_frozen_unselected_or_unused_stays_and_says_why():
    model, batch = net(), rows()
    model[0].bias.requires_grad = False
    model.spare = nn.Parameter(torch.zeros(2).double())
    start = copy.deepcopy(model)
    report = Teleporter(model, config(exclude_modules=["2"])).teleport([batch], lambda m, b: cross_entropy(m[:5], b))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["0.bias"].startswith("frozen")
    assert reasons["2"].startswith("not selected")
    assert reasons["spare"] == "the loss does not depend on it on the teleport data"
    assert {layer.name for layer in report.layers if layer.moved} == {"0", "2.bias", "4", "4.bias"}
    for a, b in ((model[0].bias, start[0].bias), (model[2].weight, start[2].weight), (model.spare, start.spare)):
        assert torch.equal(a, b)
    assert report.grad_norm_after > report.grad_norm_before
    assert abs(report.loss_after - report.loss_before) <= 0.01 * report.loss_before


@pytest.mark.parametrize(
    "loss",
    [lambda model, batch: model.w.sum(), lambda model, batch: model.w.square().sum()],
    ids=["linear", "round"],
)
def test_where_the_gradient_is_as_long_everywhere_nothing_moves(loss):
    model = Weights(1.0, 2.0)
    report = Teleporter(model, config()).teleport([None], loss)
    assert (report.steps, report.stopped_because) == (0, "no_direction")
    assert model.w.tolist() == [1.0, 2.0]


def ctc(model, batch):
    frames = model(batch[0]).log_softmax(-1).unsqueeze(1)
    return nn.functional.ctc_loss(frames, torch.tensor([[1, 2]]), (len(frames),), (2,))


def test_a_model_that_cannot_be_differentiated_twice_is_refused_with_a_way_out():
    model, batch = net(), rows()
    start = flat(model)
    teleporter = Teleporter(model, config())
    for action in (teleporter.check, lambda batch, loss: teleporter.teleport([batch], loss)):
        with pytest.raises(ValueError, match=r"differentiated twice.*attn_implementation='eager'.*method='null_space'"):
            action(batch, ctc)
    assert torch.equal(flat(model), start)


@pytest.mark.parametrize("scope", ["joint", "batch"])
def test_an_event_makes_no_more_passes_than_it_says(scope):
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch)

    settings = config(scope=scope, num_batches=2, steps_per_batch=3, learning_rate=5.0)
    report = Teleporter(net(), settings).teleport([rows(), rows(seed=1)], counted)
    # A double backward is a pass without a forward.
    assert 2 * 3 + report.steps < calls <= LevelSet.passes(settings) - report.steps - 1


def test_a_trainer_teleports_and_trains(tmp_path):
    trainer = make(tmp_path, model=gpt2(), config=teleports("level_set"), max_steps=4)
    trainer.train()
    (report,) = trainer.teleport_reports
    assert (report.method, report.rolled_back) == ("level_set", False)
    assert report.steps > 0
    assert report.grad_norm_after > report.grad_norm_before
    assert abs(report.loss_after - report.loss_before) <= 0.01 * report.loss_before
    assert trainer.state.global_step == 4
