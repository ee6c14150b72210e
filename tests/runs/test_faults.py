"""Whatever goes wrong in a teleport: the weights are those before, bit for bit, or validly teleported, and training goes on or
stops with the error that was raised."""

import errno
import random
import tempfile
from contextlib import contextmanager, nullcontext
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn, optim
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.layers.point import loss_at
from hf_teleport.event.climb import Climb
from hf_teleport.lab.data import ImageTensors
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.isolation import preserved_rng
from hf_teleport.weights.snapshot import Snapshot
from hf_teleport.layers.layer import Layer
from hf_teleport.methods import BasisTurn, NullSpace
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification
from hf_teleport.optimizers.state import OptimizerState
from hf_teleport.layers.subspace import Representation, converging
from hf_teleport.methods.basis import bases, turn

from ranks import run
from tiny_models import VOCAB
from tiny_models import loss_fn as language_loss

METHODS = ["null_space", "basis"]
LINALG = torch.linalg.LinAlgError("the algorithm failed to converge")
FULL = OSError(errno.ENOSPC, "No space left on device")


# --- A scene, and what must hold of it whatever happened ----------------------------------------------------------------------


class Net(nn.Module):
    """Dropout, and buffers that a forward in training changes."""

    def __init__(self):
        super().__init__()
        hidden = nn.Linear(48, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh()
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 4))

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.layers(x), labels)


def net_loss(model, batch):
    return model(**batch)


def rows(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 48, generator=generator), "labels": torch.randint(0, 4, (size,), generator=generator)}


def texts(size, seed):
    ids = torch.randint(0, VOCAB, (size, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.1, use_cache=False))


class Scene:
    """A model, an optimizer that has trained it, batches to teleport on, and one to hold back."""

    def __init__(self, method="null_space", dtype=torch.float32, **settings):
        torch.manual_seed(0)
        self.loss, make, draw = (language_loss, llama, texts) if method == "basis" else (net_loss, Net, rows)
        self.model = make().to(dtype)
        self.batches, self.held_back = [draw(8, seed) for seed in (1, 2)], draw(8, 3)
        if dtype != torch.float32 and method != "basis":
            for batch in (*self.batches, self.held_back):
                batch["x"] = batch["x"].to(dtype)
        self.config = TeleportConfig(method=method, **{"steps_per_batch": 2, "max_growth": None, **settings})
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-4)  # float16 has no 1e-8
        self.train()
        self.train()
        self.loss(self.model, self.batches[0]).backward()  # gradients that are none of a teleport's business
        self.model.get_submodule("layers" if method != "basis" else "model.layers").eval()
        self.remember()

    def train(self):
        self.optimizer.zero_grad()
        self.loss(self.model, self.batches[0]).backward()
        self.optimizer.step()

    def remember(self):
        self.before, self.around, self.losses = self.state(), self.surroundings(), self.evaluated()

    def state(self):
        """All that an event may change."""
        kept = {
            (i, name): value for i, p in enumerate(self.model.parameters()) for name, value in self.optimizer.state[p].items()
        }
        return {name: value.detach().clone() for name, value in (*self.model.named_parameters(), *kept.items())}

    def surroundings(self):
        """All that it may not."""
        parameters = list(self.model.parameters())
        return {
            "modes": [module.training for module in self.model.modules()],
            "buffers": [buffer.tolist() for buffer in self.model.buffers()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
            "kinds": [(p.requires_grad, p.dtype, id(p), p.data_ptr()) for p in parameters],
            "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
            "torch": (torch.is_grad_enabled(), torch._C._len_torch_function_stack(), torch.get_float32_matmul_precision()),
        }

    def evaluated(self):
        """The mean loss over the batches, and that of the one held back, without the teleporter."""
        modes = [module.training for module in self.model.modules()]
        with preserved_rng():
            losses = [loss_at(self.model, self.loss, batch, seed=0) for batch in (*self.batches, self.held_back)]
        for module, mode in zip(self.model.modules(), modes, strict=True):
            module.training = mode
        return sum(losses[:-1]) / len(losses[:-1]), losses[-1]

    def teleport(self, loss=None, batches=None, held_back=True):
        held_back = self.held_back if held_back is True else held_back
        teleporter = Teleporter(self.model, self.config, optimizer=self.optimizer)
        return teleporter.teleport(batches or self.batches, loss or self.loss, held_back)

    def untouched(self):
        return same(self.state(), self.before)

    def assert_sound(self, *, held_back=True):
        """Untouched or validly teleported; nothing else has changed; training goes on."""
        assert self.surroundings() == self.around
        if not self.untouched():
            assert all(value.isfinite().all() for value in self.state().values())
            for loss, before in list(zip(self.evaluated(), self.losses, strict=True))[: 1 + held_back]:
                assert abs(loss - before) <= 1.01 * self.config.max_loss_change * before
        self.train()
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())

    def assert_untouched(self):
        assert self.untouched()
        self.assert_sound()


def same(state, other):
    return state.keys() == other.keys() and all(
        state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in other.items()
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- A fault in each look at the loss -----------------------------------------------------------------------------------------


class BrokenBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def raising(error):
    def fault(loss):
        raise error

    return fault


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


RAISED = {
    "error": RuntimeError("the cable was pulled"),
    "interrupt": KeyboardInterrupt(),
    "exhausted": StopIteration(),
    "exit": SystemExit(1),
}
NOT_FINITE = {
    "nan": lambda loss: loss * torch.nan,
    "inf": lambda loss: loss + torch.inf,
    "nan_gradient": BrokenBackward.apply,
}
NO_LOSS = {"no_scalar": lambda loss: loss.expand(2), "detached": lambda loss: loss.detach(), "none": lambda loss: None}


def broken(loss, fault, at):
    """A loss whose call number `at` goes wrong."""
    calls = count(1)

    def wrapped(model, batch):
        return fault(loss(model, batch)) if next(calls) == at else loss(model, batch)

    return wrapped


def looks(method, **settings):
    """The numbers of all calls of the loss in an undisturbed event."""
    scene, calls = Scene(method, **settings), count(1)
    scene.teleport(lambda model, batch: (next(calls), scene.loss(model, batch))[1])
    return range(1, next(calls))


@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
@pytest.mark.parametrize("method", METHODS)
def test_an_error_at_any_look_reaches_the_user_and_leaves_no_trace(method, error):
    scene = Scene(method)
    for at in looks(method):
        with pytest.raises(type(error)) as raised:
            scene.teleport(broken(scene.loss, raising(error), at))
        assert raised.value is error, at
        assert scene.untouched(), at
        assert scene.surroundings() == scene.around, at
    scene.assert_sound()


@pytest.mark.parametrize("fault", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_at_any_look_is_no_move_or_a_valid_one(method, fault):
    ends = []
    for at in looks(method):
        scene = Scene(method)
        report = scene.teleport(broken(scene.loss, fault, at))
        assert scene.untouched() == (report.steps == 0), at
        ends.append(report.stopped_because)
        scene.assert_sound()
    assert ends[0] == ends[-1] == "non_finite"
    # A step that only fails once is made at half its length.
    assert method == "basis" or ends.count("steps_done") > 4


@pytest.mark.parametrize("fault", NO_LOSS.values(), ids=NO_LOSS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_loss_is_an_error_or_goes_unseen(method, fault):
    """A forward at shifted weights looks at no loss."""
    raised = 0
    for at in looks(method):
        scene = Scene(method)
        try:
            assert scene.teleport(broken(scene.loss, fault, at)).steps
        except (ValueError, TypeError, RuntimeError):
            raised += 1
            assert scene.untouched(), at
        scene.assert_sound()
    assert raised >= 3


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_runs_out_once_is_made_up_for_with_smaller_batches(method):
    for at in looks(method):
        scene, sizes = Scene(method), []

        def loss(model, batch, scene=scene, sizes=sizes):
            sizes.append(len(batch["labels"]))
            return scene.loss(model, batch)

        report = scene.teleport(broken(loss, raising(out_of_memory()), at))
        assert report.steps, at
        assert not scene.untouched(), at
        assert set(sizes[:at]) == {8}, at
        assert set(sizes[at:]) == {4}, at
        scene.assert_sound(held_back=False)  # of which only half was watched


# --- A fault in each phase ----------------------------------------------------------------------------------------------------

# What fails, and in which of its calls; it does its work before.
PHASES = {
    "null_space": {
        "audit": ("hf_teleport.methods.null_space.method.audit", 2),
        "survey": (NullSpace, "survey", 2),
        "decomposition": ("hf_teleport.methods.null_space.decomposition.null_space", 2),
        "fit": (NullSpace, "fit", 1),
        "first_copy": (Snapshot, "__init__", 1),
        "begin": (NullSpace, "begin", 2),
        "direction": ("hf_teleport.methods.null_space.method.fast_direction", 2),
        "propose": (NullSpace, "propose", 3),
        "copy_before_a_step": (Snapshot, "__init__", 3),
        "half_a_step": (Layer, "add_", 1),
        "half_a_later_step": (Layer, "add_", 7),
        "step_made": (Climb, "_step", 2),
        "held_back": (Teleporter, "_shorten", 1),
        "verdict": (Teleporter, "_verdict", 1),
        "accept": (NullSpace, "accept", 1),
        "broadcast": (Ranks, "broadcast", 1),
    },
    "basis": {
        "symmetries": ("hf_teleport.methods.basis.method.find_symmetries", 1),
        "survey": (BasisTurn, "survey", 2),
        "observe": (bases.Basis, "observe", 1),
        "choose": (BasisTurn, "_chosen", 2),
        "fit": (BasisTurn, "fit", 1),
        "copy": (Snapshot, "__init__", 1),
        "propose": (BasisTurn, "propose", 1),
        "gains_folded": (turn, "_scale_gain", 1),
        "half_a_turn": (turn, "_turn", 3),
        "optimizer_half_turned": (OptimizerState, "turn", 2),
        "turned": (turn.Turn, "carry_out", 1),
        "held_back": (Teleporter, "_shorten", 1),
        "review": (BasisTurn, "review", 1),
        "verdict": (Teleporter, "_verdict", 1),
        "accept": (BasisTurn, "accept", 1),
        "keep": (Teleporter, "_keep", 1),
    },
}


def failing(monkeypatch, where, error):
    """Let a function fail once, in the given call, after its work."""
    *place, at = where
    if len(place) == 1:
        place = place[0].rsplit(".", 1)
        place[0] = __import__(place[0], fromlist=["_"])
    real, calls = getattr(*place), count(1)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == at:
            raise error
        return result

    monkeypatch.setattr(*place, wrapped)
    return calls


@pytest.mark.parametrize(("method", "phase"), [(method, phase) for method in METHODS for phase in PHASES[method]])
def test_a_fault_in_any_phase(monkeypatch, method, phase):
    for error in (RuntimeError("the cable was pulled"), KeyboardInterrupt(), out_of_memory()):
        scene = Scene(method)
        with monkeypatch.context() as patch:
            failing(patch, PHASES[method][phase], error)
            if isinstance(error, torch.OutOfMemoryError):
                assert scene.teleport().steps
                assert not scene.untouched()
                scene.assert_sound(held_back=False)
            else:
                with pytest.raises(type(error)) as raised:
                    scene.teleport()
                assert raised.value is error
                scene.assert_untouched()


@pytest.mark.parametrize("method", METHODS)
def test_a_fault_when_the_optimizers_state_has_been_reset(monkeypatch, method):
    scene = Scene(method, optimizer_state="reset")

    def keep(self, method, weights, real=Teleporter._keep):
        monkeypatch.setattr(Ranks, "broadcast", lambda *_: raising(RuntimeError("the cable was pulled"))(None))
        real(self, method, weights)

    monkeypatch.setattr(Teleporter, "_keep", keep)
    with pytest.raises(RuntimeError, match="cable"):
        scene.teleport()
    scene.assert_untouched()


# --- Moves that go wrong ------------------------------------------------------------------------------------------------------


def exploding(monkeypatch, value):
    """Each step of the null space adds a value to what it moves."""

    def add_(self, move, scale, real=Layer.add_):
        real(self, move + value, scale)

    monkeypatch.setattr(Layer, "add_", add_)


@pytest.mark.parametrize("growth", [2.0, None])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e3])
def test_a_step_that_explodes_is_undone(monkeypatch, value, growth):
    exploding(monkeypatch, value)
    scene = Scene(max_growth=growth)
    report = scene.teleport()
    # At a step it is the gradient that is looked at; the loss is, after the last one.
    reason = "non_finite" if value != 1e3 else "max_loss_change" if growth is None else "max_growth"
    assert report.stopped_because == reason
    assert not any(layer.moved for layer in report.layers)
    scene.assert_untouched()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1.5])
def test_a_turn_that_is_none_is_undone(monkeypatch, factor):
    def carry_out(self, state, real=turn.Turn.carry_out):
        real(self, state)
        next(iter(self.rotations)).parts[0].parameter.data.mul_(factor)

    monkeypatch.setattr(turn.Turn, "carry_out", carry_out)
    scene = Scene("basis", max_loss_change=10.0)
    report = scene.teleport(held_back=None)
    assert report.stopped_because == ("not_a_symmetry" if factor == 1.5 else "non_finite")
    assert report.rolled_back
    scene.assert_untouched()


def test_a_weight_that_is_not_finite_is_undone_though_the_loss_is(monkeypatch):
    def add_(self, move, scale, real=Layer.add_):
        real(self, move, scale)
        if self.name == "layers.4":
            self.bias.data[0] = torch.inf  # tanh(inf) = 1

    monkeypatch.setattr(Layer, "add_", add_)
    scene = Scene(max_loss_change=10.0)
    report = scene.teleport()
    assert report.stopped_because == "non_finite"
    scene.assert_untouched()


# --- The batch held back ------------------------------------------------------------------------------------------------------


def looking_back(scene, seen, drift=0.0):
    """The scene's loss; on the batch held back it is noted, and has grown by `drift` at each look."""

    def loss(model, batch):
        value = scene.loss(model, batch)
        if batch is scene.held_back:
            value = value + sum(drift for _ in seen)
            seen.append(float(value))
        return value

    return loss


def test_a_move_that_changes_the_loss_held_back_is_shortened():
    unguarded = Scene(max_loss_change=1.0)
    unguarded.teleport()
    (_, start), (_, end) = unguarded.losses, unguarded.evaluated()
    full = weights(unguarded.model) - torch.cat([unguarded.before[n].flatten() for n, _ in unguarded.model.named_parameters()])
    limit = abs(end - start) / start / 6

    scene, seen = Scene(max_loss_change=limit), []
    report = scene.teleport(looking_back(scene, seen))
    assert report.steps == 4
    reference, *tries = seen
    changes = [abs(loss - reference) / reference for loss in tries]
    assert len(tries) == 3
    assert min(changes[:-1]) > limit >= changes[-1]
    before = torch.cat([scene.before[n].flatten() for n, _ in scene.model.named_parameters()])
    torch.testing.assert_close(weights(scene.model) - before, full / 4, rtol=1e-3, atol=1e-6)
    scene.assert_sound()


def test_a_move_that_changes_the_loss_held_back_at_any_length_is_undone():
    scene, seen = Scene(max_loss_change=1e-5), []
    report = scene.teleport(looking_back(scene, seen))
    assert (report.stopped_because, report.rolled_back, report.steps) == ("held_back", True, 0)
    assert len(seen) == 6
    assert all("held_back" in layer.reason or not layer.movable for layer in report.layers)
    scene.assert_untouched()


def test_a_turn_that_changes_the_loss_held_back_is_undone_at_once():
    scene, seen = Scene("basis"), []
    report = scene.teleport(looking_back(scene, seen, drift=1.0))
    assert (report.stopped_because, report.rolled_back, len(seen)) == ("held_back", True, 2)
    scene.assert_untouched()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_while_a_move_is_being_shortened(at):
    scene, calls = Scene(max_loss_change=1e-5), count()

    def loss(model, batch):
        if batch is scene.held_back and next(calls) == at:
            raise RuntimeError("the cable was pulled")
        return scene.loss(model, batch)

    with pytest.raises(RuntimeError, match="cable"):
        scene.teleport(loss)
    scene.assert_untouched()


def test_a_batch_held_back_with_no_finite_loss_is_not_watched():
    scene = Scene()
    scene.held_back["x"][0] = torch.nan
    scene.remember()
    assert scene.teleport().steps
    assert all(value.isfinite().all() for value in scene.state().values())


def test_a_loss_held_back_that_is_not_finite_any_more():
    scene, seen = Scene(max_loss_change=None), []
    report = scene.teleport(looking_back(scene, seen, drift=torch.inf))
    assert report.stopped_because == "held_back"
    scene.assert_untouched()


# --- Memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [None, {"names": ["a"]}], ids=["smaller_and_smaller", "cannot_be_cut"])
def test_memory_that_always_runs_out_costs_the_event(caplog, method, batch):
    scene = Scene(method)
    batches = [{**own, **(batch or {})} for own in scene.batches]
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["labels"]))
        raise out_of_memory()

    report = scene.teleport(loss, batches)
    assert sizes == ([8] if batch else [8, 4, 2, 1])
    assert (report.stopped_because, report.rolled_back) == ("out_of_memory", True)
    assert "memory ran out, with smaller batches too" in caplog.text
    scene.assert_untouched()


def test_memory_that_runs_out_with_more_than_two_samples():
    scene = Scene()

    def loss(model, batch):
        if len(batch["labels"]) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return scene.loss(model, batch)

    assert scene.teleport(loss).steps
    scene.assert_sound(held_back=False)


def test_memory_that_runs_out_where_a_batch_is_a_tensor():
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    calls = count(1)

    def loss(model, x):
        if next(calls) == 2:
            raise out_of_memory()
        return model(x).square().mean()

    teleporter = Teleporter(model, TeleportConfig(max_loss_change=1.0))
    assert teleporter.teleport([rows(8, 1)["x"]], loss, rows(8, 2)["x"]).steps


# --- Decompositions -----------------------------------------------------------------------------------------------------------


def repeated(scene):
    """More rows than any layer has inputs, of which few differ: a Gram matrix each, and a null space."""
    return [{name: value.repeat(6, *[1] * (value.dim() - 1)) for name, value in batch.items()} for batch in scene.batches]


def decomposing(monkeypatch, name, fault, bad):
    """Let a function of torch.linalg fail where `bad(number of the call, matrix)`. Returns the matrices it was given."""
    seen, real = [], getattr(torch.linalg, name)

    def decompose(matrix, **options):
        seen.append(matrix)
        if not bad(len(seen), matrix):
            return real(matrix, **options)
        if fault == "raises":
            raise LINALG
        return tuple(part * torch.nan for part in real(matrix, **options))

    monkeypatch.setattr(torch.linalg, name, decompose)
    return seen


# Which decomposition, of which method with which settings.
DECOMPOSITIONS = {
    "independent_rows": ("qr", "null_space", {}),
    "rows": ("svd", "null_space", {}),
    "rows_of_each_batch": ("svd", "null_space", {"scope": "batch"}),
    "gram": ("eigh", "null_space", {}),
    "moments": ("eigh", "basis", {}),
    "signs": ("svd", "basis", {"basis": "predicted_decrease"}),
}


def decomposed(kind):
    """A teleport, in which the inputs of the layers are decomposed."""
    name, method, settings = DECOMPOSITIONS[kind]
    scene = Scene(method, **settings)
    # Rows that are seen to be independent are spared all but a QR.
    spared = nullcontext() if name == "qr" else mock.patch.object(Representation, "has_full_rank", return_value=False)
    with spared:
        return scene, scene.teleport(batches=repeated(scene) if kind == "gram" else None)


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_a_decomposition_that_fails_once_is_tried_again(monkeypatch, kind, fault):
    undisturbed, _ = decomposed(kind)
    seen = decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, lambda call, matrix: call == 2)
    scene, report = decomposed(kind)
    assert torch.equal(seen[1], seen[2])
    assert report.steps
    assert same(scene.state(), undisturbed.state())
    scene.assert_sound()


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_what_cannot_be_decomposed_stays_and_the_others_move(monkeypatch, kind, fault):
    # The inputs of one layer, the residual stream.
    width = 32 if DECOMPOSITIONS[kind][1] == "basis" else 65
    first = []

    def bad(call, matrix):
        if width in matrix.shape and not first:
            first.append(matrix.clone())
        return bool(first) and matrix.shape == first[0].shape and torch.equal(matrix, first[0])

    decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, bad)
    scene, report = decomposed(kind)
    assert first
    assert report.steps
    if kind != "rows_of_each_batch":  # the other batch has its own
        kept = [item for item in (*report.layers, *report.symmetries) if "did not converge" in item.reason]
        assert kept
        assert not any(getattr(item, "moved", False) for item in kept)
    assert any(layer.moved for layer in report.layers)
    scene.assert_sound()


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_where_nothing_can_be_decomposed_nothing_moves(monkeypatch, kind, fault):
    decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, lambda call, matrix: True)
    scene, report = decomposed(kind)
    assert (report.steps, report.stopped_because) == (0, "no_direction" if "null" in report.method else "nothing_movable")
    assert any("did not converge" in layer.reason for layer in report.layers)
    scene.assert_untouched()


def test_the_second_try_is_in_float64_on_the_cpu(monkeypatch):
    seen = decomposing(monkeypatch, "eigh", "raises", lambda call, matrix: call == 1)
    values, _ = converging(torch.linalg.eigh, torch.eye(3))
    assert [(matrix.dtype, matrix.device.type) for matrix in seen] == [(torch.float32, "cpu"), (torch.float64, "cpu")]
    assert values.dtype == torch.float32


# --- Weights in half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_leaves_weights_in_half_precision_as_they_were(method, dtype):
    scene = Scene(method, dtype)
    for at in looks(method):
        with pytest.raises(RuntimeError, match="cable"):
            scene.teleport(broken(scene.loss, raising(RAISED["error"]), at))
        assert scene.untouched(), at
    assert scene.surroundings() == scene.around
    scene.train()


class Mixed(nn.Module):
    """Every second layer is stored in half precision."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)])
        self.layers[1].bfloat16()
        self.layers[2].half()

    def forward(self, x, labels):
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return nn.functional.cross_entropy(x.float(), labels)


def test_a_model_of_several_precisions():
    model = Mixed()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = rows(8, 1)
    report = Teleporter(model, TeleportConfig()).teleport([batch], net_loss)
    assert {layer.name for layer in report.layers if layer.moved} == {"layers.1", "layers.2", "layers.3"}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == {n: p.dtype for n, p in before.items()}
    assert all(torch.equal(before[f"layers.0.{name}"], p) for name, p in model.layers[0].named_parameters())
    after = float(model.float()(**batch).detach())
    assert after == pytest.approx(report.loss_after, rel=1e-6)
    model.load_state_dict(before)
    assert after == pytest.approx(float(model(**batch).detach()), rel=0.01)


def test_what_overflows_when_it_is_rounded_is_undone(monkeypatch):
    """A direction that no input has may carry any weight in float32; float16 ends at 65504."""

    def add_(self, move, scale, real=Layer.add_):
        real(self, move, scale)
        if self.name == "layers.4":
            self.weight.data[:, 0] = 1e6

    scene = Scene(dtype=torch.float16)
    for model_row in (scene.model.layers[0].weight, scene.model.layers[0].bias, scene.model.layers[1].bias):
        model_row.data[0] = 0  # the first unit is silent
    scene.model.layers[1].running_mean[0] = 0
    scene.remember()
    monkeypatch.setattr(Layer, "add_", add_)
    report = scene.teleport(held_back=None)
    assert (report.stopped_because, report.rolled_back) == ("non_finite", True)
    assert scene.untouched()


def test_memory_that_runs_out_while_weights_become_float32(monkeypatch):
    scene, calls = Scene(dtype=torch.bfloat16), count(1)

    def float_(self, real=torch.Tensor.float):
        if next(calls) == 3:
            raise out_of_memory()
        return real(self)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    assert scene.teleport().steps
    monkeypatch.undo()
    assert {parameter.dtype for parameter in scene.model.parameters()} == {torch.bfloat16}


# --- Strange batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_without_samples_is_no_move():
    scene = Scene()
    empty = {name: value[:0] for name, value in scene.batches[0].items()}
    for batches in ([empty], [*scene.batches, empty]):
        report = scene.teleport(batches=batches)
        assert report.stopped_because == "non_finite"
        assert scene.untouched()
    report = scene.teleport(held_back=empty)  # nothing to watch
    assert report.steps
    scene.assert_sound()


class Experts(nn.Module):
    """A row goes to the expert of its sign."""

    def __init__(self):
        super().__init__()
        self.below, self.experts, self.above = nn.Linear(48, 32), nn.ModuleList(nn.Linear(32, 32) for _ in "ab"), nn.Linear(32, 4)

    def forward(self, x, labels):
        y = torch.tanh(self.below(x))
        signs = [x[:, 0] < 0, x[:, 0] >= 0]
        parts = [expert(y[sign]) for expert, sign in zip(self.experts, signs, strict=True)]
        return nn.functional.cross_entropy(self.above(torch.tanh(torch.cat(parts))), torch.cat([labels[sign] for sign in signs]))


@pytest.mark.parametrize("scope", ["joint", "batch"])
def test_a_layer_that_gets_no_rows_stays(scope):
    model, batch = Experts(), rows(6, 1)
    batch["x"][:, 0] = -1
    idle = weights(model.experts[1])
    before = float(model(**batch).detach())
    report = Teleporter(model, TeleportConfig(scope=scope, max_growth=None)).teleport([batch], net_loss)
    moved = {layer.name: layer.moved for layer in report.layers}
    assert moved == {"below": False, "experts.0": True, "experts.1": False, "above": True}
    assert torch.equal(weights(model.experts[1]), idle)
    assert float(model(**batch).detach()) == pytest.approx(before, rel=1e-4)


# --- In a Trainer -------------------------------------------------------------------------------------------------------------


def images(count=48):
    generator = torch.Generator().manual_seed(0)
    return ImageTensors(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4)


def mlp():
    torch.manual_seed(0)
    return MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(64, 64), num_labels=4))


def trainer(folder, kind=TeleportTrainer, config=None, made=None, **settings):
    """A run of 12 steps of 8 samples, with a teleport before the seventh."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TeleportTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    others = {"train_dataset": images(), **(made or {})}
    if issubclass(kind, TeleportTrainer):
        others["teleport_config"] = config or TeleportConfig(
            method="null_space", steps=[6], num_batches=2, batch_size=4, steps_per_batch=2
        )
    return kind(mlp(), args, **others)


def trained(folder, **settings):
    """The weights that plain Trainer ends with."""
    plain = trainer(folder, Trainer, **settings)
    plain.train()
    return weights(plain.model)


class NoMemory(TeleportTrainer):
    def _teleport_loss(self, model, batch):
        raise out_of_memory()


class NoMemoryForData(TeleportTrainer):
    """Memory runs out when the batches of a teleport are moved to the device."""

    teleporting = False

    def teleport(self):
        self.teleporting = True
        try:
            return super().teleport()
        finally:
            self.teleporting = False

    def _prepare_inputs(self, inputs):
        if self.teleporting:
            raise out_of_memory()
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("kind", [NoMemory, NoMemoryForData])
def test_without_memory_for_a_teleport_training_goes_on_with_its_own_batch_size(tmp_path, kind, smaller):
    run = trainer(tmp_path, kind, auto_find_batch_size=smaller)
    run.train()
    assert run._train_batch_size == 8
    assert [report.stopped_because for report in run.teleport_reports] == ["out_of_memory"]
    assert torch.equal(weights(run.model), trained(tmp_path))


def test_too_little_memory_before_training_is_not_taken_for_bad_data(tmp_path, caplog):
    trainer(tmp_path, NoMemory, TeleportConfig(method="null_space", num_batches=1), max_steps=1).train()
    assert "memory" in caplog.text
    assert "Check the data" not in caplog.text


def test_without_a_decomposition_training_goes_on(tmp_path, monkeypatch):
    for name in ("qr", "svd"):
        decomposing(monkeypatch, name, "raises", lambda call, matrix: True)
    run = trainer(tmp_path)
    run.train()
    assert [report.stopped_because for report in run.teleport_reports] == ["no_direction"]
    assert torch.equal(weights(run.model), trained(tmp_path))


def test_an_event_undone_by_the_batch_held_back_costs_training_nothing(tmp_path):
    config = TeleportConfig(method="null_space", steps=[6], num_batches=2, batch_size=4, steps_per_batch=2, max_loss_change=1e-6)
    run = trainer(tmp_path, config=config)
    run.train()
    assert [report.stopped_because for report in run.teleport_reports] == ["held_back"]
    assert torch.equal(weights(run.model), trained(tmp_path))


class Failing(ImageTensors):
    """Rows of which the n-th that is drawn cannot be read."""

    def __init__(self, at):
        super().__init__(images().images, images().labels)
        self.at, self.drawn = at, count(1)

    def __getitem__(self, index):
        if next(self.drawn) == self.at:
            raise OSError("no such file")
        return super().__getitem__(index)


@contextmanager
def fails(match, kind=OSError):
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(kind, match=match):
        yield
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == rng[1:]


def test_a_row_that_cannot_be_read_is_found_before_training(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at=3)})
    before = weights(run.model)
    with pytest.raises(OSError, match="no such file"):
        run.train()
    assert run.state.global_step == 0
    assert torch.equal(weights(run.model), before)


def test_a_row_that_cannot_be_read_at_the_teleport_leaves_the_weights_of_that_step(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at=10 + 8)})
    with pytest.raises(OSError, match="no such file"):
        run.train()
    assert run.state.global_step == 6
    assert torch.equal(weights(run.model), trained(tmp_path, max_steps=6))
    assert run.model.training


@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_row_that_cannot_be_read_for_a_teleport_by_hand(tmp_path, at):
    run = trainer(tmp_path, made={"teleport_dataset": Failing(at)})
    before = weights(run.model)
    with fails("no such file"):
        run.teleport()
    assert torch.equal(weights(run.model), before)
    assert run.teleport().steps


def test_a_collator_that_fails(tmp_path):
    def collate(rows):
        torch.rand(1), random.random(), np.random.rand()
        raise OSError("these rows do not fit together")

    run = trainer(tmp_path, made={"data_collator": collate})
    before = weights(run.model)
    with fails("do not fit"):
        run.teleport()
    assert torch.equal(weights(run.model), before)


def test_fewer_rows_than_one_batch(tmp_path):
    run = trainer(tmp_path, made={"teleport_dataset": images().first(3)})
    seen = []
    run._teleport_loss = lambda model, batch, real=run._teleport_loss: (seen.append(len(batch["labels"])), real(model, batch))[1]
    run.train()
    assert set(seen) == {3}
    assert run.teleport_reports[0].steps
    assert run.state.global_step == 12


class Grumpy(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "teleport/steps" in logs:
            raise ConnectionError("the tracker is gone")


def test_a_tracker_that_fails_when_it_is_told_of_a_teleport(tmp_path):
    run = trainer(tmp_path, made={"callbacks": [Grumpy()]})
    with pytest.raises(ConnectionError, match="tracker"):
        run.train()
    (report,) = run.teleport_reports
    assert report.steps
    batches, _ = run._teleport_batches(2, event=6)
    losses = [loss_at(run.model, run._teleport_loss, batch, seed=0) for batch in batches]
    assert sum(losses) / 2 == pytest.approx(report.loss_before, rel=1e-4)


WRITERS = {
    "weights": "transformers.modeling_utils.safe_save_file",
    "optimizer": "torch.save",
    "state": "transformers.trainer_callback.TrainerState.save_to_json",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_at_a_checkpoint_after_a_teleport(tmp_path, monkeypatch, writer):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **saving)
    whole.train()
    cut = trainer(tmp_path / "cut", **saving)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                monkeypatch.setattr(writer, lambda *args, **kwargs: raising(FULL)(None))

    cut.add_callback(Full())
    with pytest.raises(OSError, match="No space left"):
        cut.train()
    assert [report.steps > 0 for report in cut.teleport_reports] == [True]
    monkeypatch.undo()
    resumed = trainer(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


# --- On two ranks -------------------------------------------------------------------------------------------------------------


def on_two_ranks(rank, size):
    return {"odd": odd_batches(size), "half": half_precision(size), "memory": memory_of_one(rank)}


def in_parallel(model, rows, size, **settings):
    """A run with a teleport before its first step, on batches of 3. Returns its reports."""
    with tempfile.TemporaryDirectory() as folder:
        args = TeleportTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8 // size,
            num_train_epochs=1,
            learning_rate=0.1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            optim="sgd",
        )
        run = TeleportTrainer(
            model, args, train_dataset=rows, teleport_config=TeleportConfig(method="null_space", num_batches=2, batch_size=3)
        )
        sizes = []
        real = run._teleport_loss
        run._teleport_loss = lambda model, batch: (sizes.append(len(batch["labels"])), real(model, batch))[1]
        run.train()
        (report,) = run.teleport_reports
    return {"weights": weights(model), "steps": report.steps, "sizes": set(sizes), "reasons": [v.reason for v in report.layers]}


def odd_batches(size):
    return in_parallel(mlp(), images(), size)


def half_precision(size):
    data = images()
    return in_parallel(mlp().bfloat16(), ImageTensors(data.images.bfloat16(), data.labels), size)


def memory_of_one(rank):
    """What comes of an event if memory runs out in one process while it copies the weights."""
    scene = Scene()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            failing(patch, (Snapshot, "__init__", 2), out_of_memory())
        try:
            return scene.teleport().steps, weights(scene.model), ""
        except RuntimeError as error:
            return 0, weights(scene.model), str(error)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


def test_a_batch_that_cannot_be_shared_out_is_everybodys(two):
    first, second = (each["odd"] for each in two)
    assert first["sizes"] == second["sizes"] == {3}
    assert first["steps"] == second["steps"] > 0
    assert first["reasons"] == second["reasons"]
    assert torch.equal(first["weights"], second["weights"])


def test_weights_in_half_precision_stay_the_same_in_all_processes(two):
    first, second = (each["half"] for each in two)
    assert first["steps"] > 0
    assert torch.equal(first["weights"], second["weights"])


def test_memory_that_runs_out_in_one_process_while_it_copies_weights(two):
    first, second = (each["memory"] for each in two)
    assert first[2] == second[2] == ""
    assert first[0] == second[0] > 0
    assert torch.equal(first[1], second[1])
