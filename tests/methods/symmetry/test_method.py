"""Symmetry teleportation: the action against its formula in float64, the models that it takes, real rows, and training."""

import copy
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.lab.data import ImageTensors
from hf_teleport.lab.models import CNNConfig, CNNForImageClassification, MLPConfig, MLPForImageClassification
from hf_teleport.methods import GroupAction
from hf_teleport.methods.symmetry.method import group_action
from hf_teleport.methods.symmetry.perceptron import Activation
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.whole import Weights

from tiny_models import build, loss_fn
from tiny_runs import arguments, flat

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
LEAKY = Activation(nn.LeakyReLU(0.1))


def net(*sizes, act=nn.LeakyReLU, bias=True):
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o, bias=bias), act())]
    return nn.Sequential(*layers[:-1]).double()


def data(count, width=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).double(), torch.randint(0, classes, (count,), generator=generator)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def config(**settings):
    return TeleportConfig(method="symmetry", **settings)


def surveyed(model, batch, loss=cross_entropy, **settings):
    """A method that has seen a batch, and where the batch stands."""
    method = GroupAction(model, loss, config(**settings))
    point = method.evaluate(batch, 0)
    method.survey(point)
    method.fit()
    return method, point


# --- the action -----------------------------------------------------------------------------------------------------------


def features(matrices, activations, rows):
    """The output of each layer, after its activation."""
    found = []
    for matrix, activation in zip(matrices, [*activations, None], strict=True):
        inputs = rows if matrix.shape[1] == rows.shape[1] else torch.cat([rows, torch.ones(len(rows), 1).to(rows)], 1)
        rows = inputs @ matrix.T
        rows = rows if activation is None else activation(rows)
        found.append(rows)
    return found


@given(widths=st.lists(st.integers(1, 7), min_size=3, max_size=6), biased=st.booleans(), share=st.floats(0, 1))
def test_features_are_acted_on_and_outputs_stay(widths, biased, share):
    """For as many samples as every layer that is inverted has inputs, at most."""
    torch.manual_seed(sum(widths))
    count = max(1, round(share * (min(widths[:-2]) + biased)))
    rows = torch.randn(count, widths[0]).double()
    matrices = [torch.randn(o, i + biased).double() / i**0.5 for i, o in pairwise(widths)]
    elements = [torch.eye(o).double() + 0.3 * torch.randn(o, o).double() for o in widths[1:-1]]
    activations = [LEAKY] * len(elements)
    before = features(matrices, activations, rows)
    after = features(group_action(elements, matrices, activations, rows), activations, rows)
    for a, b, element in zip(after, before, [*elements, torch.eye(widths[-1]).double()], strict=True):
        torch.testing.assert_close(a, b @ element.T, rtol=1e-6, atol=1e-6 * float(b.norm()))


def test_square_and_invertible_it_is_the_papers_formula():
    rows, weights = torch.randn(6, 6).double(), [torch.randn(6, 6).double(), torch.randn(3, 6).double()]
    element = torch.eye(6).double() + 0.2 * torch.randn(6, 6).double()
    h = rows.T
    wanted = nn.functional.leaky_relu(element @ nn.functional.leaky_relu(weights[0] @ h, 0.1), 10.0) @ h.inverse()
    first, second = group_action([element], weights, [LEAKY], rows)
    torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second, weights[1] @ element.inverse(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elements", [[None, None], [torch.eye(5).double(), torch.eye(4).double()]])
def test_the_identity_leaves_every_weight(elements):
    matrices = [torch.randn(5, 9).double(), torch.randn(4, 6).double(), torch.randn(2, 5).double()]
    moved = group_action(elements, matrices, [LEAKY, LEAKY], torch.randn(3, 8).double())
    for new, old in zip(moved, matrices, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "outside"),
    [
        (nn.LeakyReLU(0.3), []),
        (nn.ELU(1.5), [-1.5, -2.0]),
        (nn.Tanh(), [-1.0, 1.5]),
        (nn.Sigmoid(), [0.0, 1.2, -0.1]),
        (nn.Softplus(2.0), [0.0, -1.0]),
        (nn.Identity(), []),
    ],
)
def test_inverses(module, outside):
    values = torch.linspace(-6, 6, 41).double()
    activation = Activation(module)
    torch.testing.assert_close(activation.inverse(activation(values)), values, rtol=1e-9, atol=1e-9)
    assert not activation.inverse(torch.tensor(outside).double()).isfinite().any()


# --- the ascent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "bias"), [(nn.Tanh, True), (nn.LeakyReLU, False)])
def test_the_gradient_is_that_of_finite_differences(act, bias):
    model = net(8, 4, 5, 3, act=act, bias=bias)
    before = copy.deepcopy(model.state_dict())
    method, point = surveyed(model, data(3))
    rows, epsilon = method.perceptron.rows(point), 1e-5

    def objective(generators):
        method._act(generators, rows)
        value = method.evaluate(point.batch, 0).grad_norm ** 2
        model.load_state_dict(before)
        return value

    gradients = method.gradients(point)
    assert [tuple(g.shape) for g in gradients] == [(4, 4), (5, 5)]
    for k, gradient in enumerate(gradients):
        for i, j in torch.cartesian_prod(*map(torch.arange, gradient.shape)).tolist():
            shift = [torch.zeros_like(g) for g in gradients]
            shift[k][i, j] = epsilon
            difference = (objective(shift) - objective([-s for s in shift])) / (2 * epsilon)
            assert float(gradient[i, j]) == pytest.approx(difference, rel=1e-4, abs=1e-7)


def element_of(model, before):
    """g, from what it made of the second of two layers, which is square."""
    return torch.linalg.solve(model[2].weight.detach(), before[2].weight.detach())


@pytest.mark.parametrize("step_size", ["fixed", "relative"])
def test_a_step_is_as_long_as_the_settings_say(step_size):
    model = net(8, 3, 3)
    before = copy.deepcopy(model)
    method, point = surveyed(model, data(4), step_size=step_size, learning_rate=0.05)
    (gradient,) = method.gradients(point)
    move = method.propose(point)
    for fraction in (1.0, 0.5):
        model.load_state_dict(before.state_dict())
        move(fraction)
        length = 1 if step_size == "fixed" else 3**0.5 / gradient.norm()
        expected = torch.eye(3).double() + fraction * 0.05 * length * gradient
        torch.testing.assert_close(element_of(model, before), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.Tanh, nn.ELU, nn.Softplus, nn.Identity])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_steps_raise_the_gradient_and_keep_the_loss(act, bias):
    model = net(8, 7, 6, 3, act=act, bias=bias)
    last = None if not bias else model[-1].bias.detach().clone()
    settings = config(steps_per_batch=4, learning_rate=0.02, max_growth=None)
    report = Teleporter(model, settings).teleport([data(6)], cross_entropy)
    assert report.steps == 4
    assert report.grad_norm_after > 1.05 * report.grad_norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-8)
    assert [layer.name for layer in report.layers if layer.moved] == ["0", "2", "4"]
    if bias:
        assert torch.equal(model[-1].bias, last)
        assert "no element acts on it" in report.layers[-1].reason


def test_more_samples_than_inputs_change_the_loss_and_the_guard_undoes_that():
    model = net(12, 7, 6, 3)
    before, batch = copy.deepcopy(model), data(40, width=12)
    report = Teleporter(model, config(max_loss_change=None, max_growth=None)).teleport([batch], cross_entropy)
    assert abs(report.loss_after - report.loss_before) > 1e-3 * report.loss_before

    model = copy.deepcopy(before)
    report = Teleporter(model, config(max_loss_change=1e-7)).teleport([batch], cross_entropy)
    assert (report.steps, report.stopped_because) == (0, "max_loss_change")
    assert torch.equal(flat(model), flat(before))
    assert "40 input rows have no left inverse in 13 dimensions" in report.layers[0].reason

    model = copy.deepcopy(before)
    report = Teleporter(model, config(max_loss_change=0.01)).teleport([batch], cross_entropy)
    assert abs(report.loss_after - report.loss_before) <= 0.01 * report.loss_before


@pytest.mark.parametrize("limit", [0.01, None])
def test_a_move_out_of_the_range_of_the_activation_leaves_no_nan(limit):
    model = net(8, 7, 6, 3, act=nn.Tanh)
    with torch.no_grad():
        model[0].weight.mul_(6)
    before = copy.deepcopy(model)
    settings = {"max_growth": None, "max_loss_change": limit, "steps_per_batch": 3}
    report = Teleporter(model, config(learning_rate=1000.0, **settings)).teleport([data(6)], cross_entropy)
    assert (report.steps, report.stopped_because) == (0, "non_finite")
    assert torch.equal(flat(model), flat(before))
    report = Teleporter(model, config(learning_rate=0.02, **settings)).teleport([data(6)], cross_entropy)
    assert flat(model).isfinite().all()
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6)


def test_a_saturated_activation_gives_no_direction():
    model = net(8, 7, 6, 3, act=nn.Tanh)
    with torch.no_grad():
        model[0].weight.mul_(1e4)
        model[0].bias.fill_(1e4)
    before = flat(model).clone()
    report = Teleporter(model, config()).teleport([data(6)], cross_entropy)
    assert (report.steps, report.stopped_because) == (0, "no_direction")
    assert torch.equal(flat(model), before)


def test_a_singular_element_is_halved(monkeypatch):
    """`I + M = 0` has no inverse; `I / 2` has one."""
    model = net(8, 4, 3)
    before = copy.deepcopy(model)
    monkeypatch.setattr(GroupAction, "gradients", lambda self, point: [-torch.eye(4).double()])
    settings = config(learning_rate=1.0, steps_per_batch=1, max_growth=None)
    report = Teleporter(model, settings).teleport([data(6)], cross_entropy)
    assert report.steps == 1
    torch.testing.assert_close(model[2].weight.detach(), 2 * before[2].weight.detach())
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-10)


# --- the models -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers that a forward of one's own joins."""

    def __init__(self, forward, **more):
        super().__init__()
        self.below, self.above = nn.Linear(8, 8), nn.Linear(8, 3)
        for name, module in more.items():
            setattr(self, name, module)
        self.own = forward
        self.double()

    def forward(self, x):
        return self.own(self, x)


def shared(model, x):
    return model.above(torch.tanh(model.below(torch.tanh(model.below(x)))))


def residual(model, x):
    h = torch.tanh(model.below(x))
    return model.above(h) + h[:, :3]


def tied(model, x):
    return model.above(torch.tanh(model.below(x))) + torch.cdist(x, model.below.weight)[:, :3]


def normed(model, x):
    return model.above(model.norm(torch.tanh(model.below(x))))


def frozen_bias():
    model = net(8, 5, 3)
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: net(8, 7, 3, act=nn.ReLU), r"input of '2' is not the output of '0' after such.* without weights are ReLU\."),
        (lambda: net(8, 7, 3, act=nn.GELU), "without weights are GELU"),
        (lambda: Net(shared), "'below' is used 2 times in a forward"),
        (lambda: Net(residual), "the output of 'below' goes elsewhere too, and not to 'above' alone"),
        (lambda: Net(tied), r"'below' is no such weight \(tied: also used by cdist"),
        (lambda: Net(normed, norm=nn.LayerNorm(8)), r"'norm' is no such weight \(elementwise.*\), nor are 1 others"),
        (lambda: Net(normed, norm=nn.LayerNorm(8, elementwise_affine=False)), "input of 'above' is not the output of 'below'"),
        (frozen_bias, "the bias of '0' is frozen"),
    ],
)
def test_other_models_are_refused_before_anything_moves(make, found):
    model = make()
    before = flat(model).clone()
    for run in (lambda t: t.check(data(4), cross_entropy), lambda t: t.teleport([data(4)], cross_entropy)):
        with pytest.raises(ValueError, match=f"(?s){found}.*Use method='null_space', which works on any model"):
            run(Teleporter(model, config()))
    assert torch.equal(flat(model), before)


def cnn():
    settings = CNNConfig(image_size=8, channels=(1, 4, 4), num_labels=3)
    return CNNForImageClassification(settings), {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.arange(3)}


@pytest.mark.parametrize(("make", "found"), [(cnn, r"\(conv\), nor are 1 others"), (lambda: build("bert"), "'bert.embeddings")])
def test_convolutions_and_transformers_are_refused(make, found):
    model, batch = make()
    with pytest.raises(ValueError, match=f"{found}.*Use method='null_space'"):
        Teleporter(model, config()).check(batch, loss_fn)


def test_several_processes_are_refused():
    method = GroupAction(net(8, 5, 3), cross_entropy, config(), weights=Weights(ranks := Ranks(several=False)))
    point = method.evaluate(data(4), 0)
    ranks.size = 2
    with pytest.raises(ValueError, match="in 2 processes; allowed: in one"):
        method.survey(point)


def test_batches_that_take_different_layers_are_refused():
    model = Net(lambda m, x: m.above(torch.tanh((m.below if x.sum() > 0 else m.other)(x))), other=nn.Linear(8, 8))
    batch = (torch.rand(4, 8).double(), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="another teleport batch goes through other layers"):
        Teleporter(model, config()).teleport([batch, (-batch[0], batch[1])], cross_entropy)


def test_a_loss_without_a_second_derivative_is_refused():
    def ctc(model, batch):
        frames = model(batch[0]).log_softmax(-1).unsqueeze(1)
        return nn.functional.ctc_loss(frames, torch.tensor([[1, 2]]), (len(frames),), (2,))

    with pytest.raises(ValueError, match=r"can be differentiated twice.*use method='null_space'"):
        Teleporter(net(8, 5, 3), config()).check(data(6), ctc)


def pooled(model, x):
    """As a sequence of two, whose positions are samples."""
    return model.above(torch.tanh(model.below(x.reshape(-1, 2, 8)))).mean(1)


def frozen_around():
    """What is frozen below and above may be anything."""
    frozen = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)), nn.Sequential(nn.ReLU(), nn.Linear(6, 3), nn.ReLU())]
    for part in frozen:
        part.requires_grad_(False)
    return nn.Sequential(frozen[0], nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), frozen[1]).double()


def unused():
    """A parameter that the loss does not depend on."""
    model = net(8, 7, 3)
    model.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: net(8, 8, 8, 3, act=lambda: nn.LeakyReLU(0.2, inplace=True)),
        lambda: Net(lambda m, x: m.above(torch.sigmoid(m.below(x)))),
        lambda: Net(pooled),
        lambda: net(8, 7, 3).float(),
        frozen_around,
        unused,
    ],
)
def test_chains_of_many_kinds(make):
    torch.manual_seed(1)
    model = make()
    x, y = data(6)
    batch = (x.to(next(model.parameters()).dtype), y[: 3 if model.__dict__.get("own") is pooled else None])
    report = Teleporter(model, config(steps_per_batch=3, max_growth=None)).teleport([batch], cross_entropy)
    assert report.steps == 3
    assert report.grad_norm_after > report.grad_norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-7 if batch[0].dtype == torch.float64 else 1e-4)


def test_an_activation_that_changes_nothing_on_the_batch_is_found():
    model = nn.Sequential(nn.Linear(8, 7), nn.Identity(), nn.LeakyReLU(0.1), nn.Linear(7, 3)).double()
    nn.init.constant_(model[0].bias, 100.0)
    method, _ = surveyed(model, data(6))
    assert method.perceptron.activations == [Activation(model[2])]


def test_only_chosen_pairs_are_acted_on():
    model = net(8, 7, 6, 3)
    settings = config(target_modules=["0", "2"], steps_per_batch=2, max_growth=None)
    report = Teleporter(model, settings).teleport([data(6)], cross_entropy)
    assert [layer.name for layer in report.layers if layer.moved] == ["0", "2"]
    assert [layer.name for layer in report.layers if not layer.moved] == ["2.bias", "4", "4.bias"]
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-10)
    with pytest.raises(ValueError, match=r"no weight of the model.*no element acts on it"):
        Teleporter(model, config(target_modules=["2"])).check(data(6), cross_entropy).require_movable()
    with pytest.raises(ValueError, match="'q_proj' matches no layer"):
        Teleporter(model, config(target_modules=["q_proj"])).check(data(6), cross_entropy)


# --- real rows, and training ------------------------------------------------------------------------------------------------


def images(count):
    """The first test images of MNIST, as a data set."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = next(parquet.ParquetFile(SHARED / "mnist" / "test.parquet").iter_batches(batch_size=count)).to_pylist()
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    pixels = torch.tensor(np.stack(pictures)).unsqueeze(1) / 255
    return ImageTensors((pixels - 0.13) / 0.31, torch.tensor([row["label"] for row in rows]))


def mlp(hidden_act="leaky_relu", width=64):
    return MLPForImageClassification(MLPConfig(hidden_sizes=(width, width), hidden_act=hidden_act, num_labels=10))


needs_mnist = pytest.mark.skipif(not (SHARED / "mnist").exists(), reason=f"needs the MNIST files in {SHARED}")


@needs_mnist
def test_real_rows():
    """In single precision the gradient grows, and the loss stays to the last digits."""
    rows, model = images(48), mlp()
    batch = {"pixel_values": rows.images, "labels": rows.labels}
    report = Teleporter(model, config(steps_per_batch=4, learning_rate=1e-3)).teleport([batch], loss_fn)
    assert report.grad_norm_after >= 1.5 * report.grad_norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6)


@needs_mnist
def test_in_training(tmp_path):
    rows = images(64)
    made = {
        "args": arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=16),
        "teleport_config": config(
            steps=[2], num_batches=1, batch_size=16, steps_per_batch=2, learning_rate=1e-3, max_loss_change=None
        ),
        "train_dataset": rows,
    }
    trainer = TeleportTrainer(mlp(), **made)
    trainer.train()
    (report,) = trainer.teleport_reports
    assert (report.method, report.steps) == ("symmetry", 2)
    assert report.grad_norm_after > report.grad_norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)

    refused = TeleportTrainer(mlp("relu"), **made)
    with pytest.raises(ValueError, match=r"'symmetry' is not allowed for this model.*ReLU"):
        refused.train()
    assert refused.state.global_step == 0
