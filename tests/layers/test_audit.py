import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_teleport import TeleportConfig
from hf_teleport.layers.audit import audit
from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.symmetries import find_symmetries

from tiny_models import build, loss_fn


def judge(model, batch, loss=loss_fn, **settings):
    """Each weight's report by its name."""
    point = evaluate(model.eval(), loss, batch, seed=0)
    _, reports = audit(model, point, TeleportConfig(**settings))
    return {report.name: report for report in reports.values()}


def mean_square(model, x):
    return model(x).square().mean()


def test_tied_embeddings_are_skipped_and_untied_heads_are_not():
    tied = judge(*build("gpt2"))["transformer.wte"]
    assert not tied.movable
    assert "tied" in tied.reason
    assert judge(*build("llama"))["lm_head"].movable


def test_every_parameter_is_movable_or_has_a_reason():
    for name in ("gpt2", "llama", "bert", "t5", "vit", "resnet", "mamba"):
        model, batch = build(name)
        reports = judge(model, batch)
        for report in reports.values():
            assert report.movable != bool(report.reason), report
        for parameter_name, _ in model.named_parameters():
            assert parameter_name in reports or parameter_name.rpartition(".")[0] in reports, parameter_name


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "resnet"])
def test_every_matrix_but_embeddings_is_movable(name):
    model, batch = build(name)
    for report in judge(model, batch).values():
        if len(report.shape) >= 2 and report.role not in ("embedding", "other") and "tied" not in report.reason:
            assert report.movable, report


class Strange(nn.Module):
    """Weights that must not move, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.uncalled = nn.Linear(4, 4)
        self.doubled = nn.Linear(4, 4)
        self.decayed = nn.Linear(4, 4)
        self.unseen = nn.Linear(4, 4)
        self.ungraded = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.frozen(self.plain(x)))
        x = torch.tanh(F.linear(x, 2 * self.doubled.weight))
        x = torch.tanh(self.decayed(x)) + self.decayed.weight.square().sum()
        x = torch.tanh(torch.cdist(x, self.unseen.weight))
        with torch.no_grad():
            extra = self.ungraded(x)
        return x + extra


def test_reasons():
    reports = judge(Strange(), torch.randn(3, 4), mean_square)
    assert reports["plain"].movable
    assert "requires_grad" in reports["frozen"].reason
    assert "does not depend" in reports["uncalled"].reason
    assert "mul" in reports["doubled"].reason
    assert "tied: also used by square" in reports["decayed"].reason
    assert "cdist" in reports["unseen"].reason
    assert "does not depend" in reports["ungraded"].reason


def test_a_hidden_use_is_caught_by_the_gradient():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            # Through NumPy, which no torch function mode follows.
            return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.t() @ x

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Hidden.apply(torch.tanh(self.layer(x)), self.layer.weight)

    report = judge(Twice(), torch.randn(3, 4), mean_square)["layer"]
    assert not report.movable
    assert "audit" in report.reason


def test_one_weight_in_two_linear_uses_moves_under_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    assert judge(Shared(), torch.randn(3, 4), mean_square)["layer"].movable


def test_a_bias_shared_by_two_layers_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    reports = judge(model, torch.randn(3, 4), mean_square)
    assert reports["0"].movable
    assert reports["2"].movable
    assert "elementwise" in reports["0.bias"].reason


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ({"target_modules": ["query", "value"]}, {"query", "value"}),
        ({"target_modules": r".*layer\.0.*\.(key|query)"}, {"query", "key"}),
        ({"target_modules": ["attention.output.dense"]}, {"dense"}),
        ({"target_modules": ["query", "key"], "exclude_modules": ["key"]}, {"query"}),
        ({"target_modules": ["query", "key"], "exclude_modules": r".*\.query"}, {"key"}),
    ],
)
def test_target_modules_follow_peft(settings, moved):
    reports = judge(*build("bert"), **settings)
    assert {name.rsplit(".", 1)[-1] for name, report in reports.items() if report.movable} == moved


def test_layers_in_wrappers_are_known_by_their_own_names():
    model, batch = build("llama")
    bare = judge(model, batch, target_modules=["layers.0.mlp.up_proj"])
    found = find_symmetries(model, loss_fn, batch)[0]
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])  # as FSDP's activation checkpointing does
    assert judge(model, batch, target_modules=["layers.0.mlp.up_proj"]) == bare
    assert [name for name, report in bare.items() if report.movable] == ["model.layers.0.mlp.up_proj"]
    assert [symmetry.name for symmetry in find_symmetries(model, loss_fn, batch)[0]] == [symmetry.name for symmetry in found]


def test_all_linear_leaves_out_the_head():
    everything, linear = judge(*build("llama")), judge(*build("llama"), target_modules="all-linear")
    assert {n for n, r in everything.items() if r.movable} - {n for n, r in linear.items() if r.movable} == {"lm_head"}


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", [["query", "qeury"], r".*qeury"])
def test_unknown_target_names_the_nearest(setting, value):
    with pytest.raises(ValueError, match=rf"{setting} = .*matches no layer.*(query|names)"):
        judge(*build("bert"), **{setting: value})


def test_weights_loaded_in_half_precision_stay_with_a_reason():
    model, batch = build("llama", dtype=torch.bfloat16)
    reports = judge(model, batch)
    assert not any(report.movable for report in reports.values())
    assert "load the model in float32" in reports["lm_head"].reason
