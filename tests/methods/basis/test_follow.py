import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_teleport.methods.basis import follow as following
from hf_teleport.methods.basis.follow import operation_name
from hf_teleport.methods.basis.norms import rms_offset
from hf_teleport.methods.basis.rules import RULES
from hf_teleport.methods.basis.symmetries import find_symmetries, followed

T = torch.Tensor


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.add, "add"),
        (T.add_, "add"),
        (T.__add__, "add"),
        (T.__radd__, "add"),
        (T.__iadd__, "add"),
        (T.__rmul__, "mul"),
        (T.__rsub__, "rsub"),
        (T.__truediv__, "truediv"),
        (T.__rmatmul__, "rmatmul"),
        (T.__matmul__, "matmul"),
        (T.T.__get__, "T"),
        (T.data.__get__, "data"),
        (T.__getitem__, "getitem"),
        (torch.relu_, "relu"),
        (F.linear, "linear"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    ],
)
def test_plain_names_of_operations(function, name):
    assert operation_name(function) == name


class Scaled(nn.Module):
    """A gain, and what makes a vector of x and the gain."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(8))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def rms(x):
    return x.square().mean(-1, keepdim=True).sqrt()


NORMS = {
    "llama": (lambda: LlamaRMSNorm(8), 0.0),
    "gemma": (lambda: GemmaRMSNorm(8), 1.0),
    "t5": (lambda: T5LayerNorm(8), 0.0),
    "by hand": (lambda: Scaled(lambda x, gain: gain * x / rms(x)), 0.0),
    "one plus, by hand": (lambda: Scaled(lambda x, gain: (1 + gain) * (x / rms(x))), 1.0),
}


class Chain(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(5, 8), middle, nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.middle(self.up(x)))


def follow(model, x):
    with followed(model) as seen:
        model(x)
    return seen.facts


def perturbed(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand_like(parameter))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NORMS)
def test_handwritten_rms_norms_are_recognised(kind, dtype):
    make, offset = NORMS[kind]
    model = Chain(perturbed(make())).to(dtype)
    facts = follow(model, torch.randn(2, 4, 5, dtype=dtype))
    (norm,) = facts.norms
    assert norm.gain is model.middle.weight
    assert norm.offset == offset
    assert norm.inputs.tolist() == facts.axis(model.up.weight, 0).features.tolist()
    assert norm.outputs.tolist() == facts.axis(norm.gain, 0).features.tolist()
    assert not [reason for features, reason in facts.fixed if set(features.tolist()) & set(norm.inputs.tolist())]


class Named(nn.Module):
    """A norm, or something else with a gain, that is called with more than its input."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.rand(8) + 0.5), norm

    def forward(self, x, *, scale):
        return self.weight * x * scale / (rms(x) if self.norm else 1)


@pytest.mark.parametrize("norm", [True, False])
def test_a_module_that_takes_keywords_is_tried_with_them(norm):
    class Calls(Chain):
        def forward(self, x):
            return self.down(self.middle(self.up(x), scale=torch.ones(())))

    assert len(follow(Calls(Named(norm)), torch.randn(2, 4, 5)).norms) == norm


def reasons_of(facts, features):
    return {reason for fixed, reason in facts.fixed if set(fixed.flatten().tolist()) & set(features.flatten().tolist())}


def test_a_product_that_is_written_into_a_part_of_a_buffer_reads_features_and_fixes_what_it_writes():
    class Tiled(Chain):
        """As TRL's fused head multiplies, a tile of the outputs at a time."""

        def forward(self, x):
            hidden = self.up(x).detach()
            tiles = torch.empty(len(x), 2)
            for start in range(0, 3, 2):
                rows = self.down.weight[start : start + 2]
                torch.mm(hidden, rows.detach().t(), out=tiles[:, : len(rows)])
            return tiles

    with torch.no_grad():
        facts = follow(model := Tiled(nn.Identity()), torch.randn(4, 5))
    written, read = (facts.axis(model.down.weight, dim).features for dim in (0, 1))
    assert reasons_of(facts, written) == {"mm has written into a part of it"}
    assert not reasons_of(facts, read) | reasons_of(facts, facts.axis(model.up.weight, 0).features)


def test_what_is_written_into_zeros_by_name_is_zero_no_more():
    class Shifted(Chain):
        def forward(self, x):
            shift = torch.zeros(8)
            torch.add(torch.ones(8), torch.ones(8), out=shift)
            return self.down(self.up(x) + shift)

    facts = follow(model := Shifted(nn.Identity()), torch.randn(4, 5))
    assert reasons_of(facts, facts.axis(model.up.weight, 0).features) == {"a constant is added"}


OTHERS = {
    "layer scale": lambda: Scaled(lambda x, gain: gain * x),
    "batch norm": lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Unflatten(0, (2, 4))),
    "L1 length": lambda: Scaled(lambda x, gain: gain * x / x.abs().mean(-1, keepdim=True)),
    "centred": lambda: Scaled(lambda x, gain: gain * (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)),
    "the mean added": lambda: Scaled(lambda x, gain: gain * x / rms(x) + 0.2 * x.mean(-1, keepdim=True) / rms(x)),
    "root of the length": lambda: Scaled(lambda x, gain: gain * x / rms(x).sqrt()),
    "minus": lambda: Scaled(lambda x, gain: -gain * x / rms(x)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_an_rms_norm_is_not_taken_for_one(kind):
    model = Chain(perturbed(OTHERS[kind]()))
    facts = follow(model, torch.randn(2, 4, 5))
    assert not facts.norms
    stopped = [*(features for features, _ in facts.fixed), *(features for _, features in facts.factors)]
    fixed = {feature for features in stopped for feature in features.flatten().tolist()}
    assert set(facts.axis(model.up.weight, 0).features.tolist()) <= fixed


def test_inputs_of_length_one_make_no_norm_of_what_scales():
    model = nn.Sequential(nn.Linear(5, 8), LlamaRMSNorm(8), Scaled(lambda x, gain: gain * x), nn.Identity())
    facts = follow(model, torch.randn(2, 4, 5))
    assert [norm.gain for norm in facts.norms] == [model[1].weight]


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-2])
def test_epsilon_is_whatever_is_left_of_the_length(epsilon):
    x, gain = torch.randn(7, 6).double(), torch.rand(6).double()
    y = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    assert rms_offset(x, gain * y, gain) == 0.0
    assert rms_offset(x, (1 + gain) * y, gain) == 1.0
    assert rms_offset(x, y, None) == 1.0
    assert rms_offset(x, gain * y, None) is None
    assert rms_offset(x, gain * y, gain[:5]) is None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "gelu"),
        (torch.tanh, "tanh"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x.exp(), "exp"),
        (lambda x: torch.fft.rfft(x).real, "fft_rfft"),
        (lambda x: torch.ops.aten.gelu.default(x), "gelu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operations_without_a_rule_fix_features_and_are_named(function, name):
    model = nn.Sequential(nn.Linear(5, 8))
    with followed(model) as seen:
        output = function(model(torch.randn(2, 5)))
    assert seen.tag(output) is None
    ((features, reason),) = [(f, r) for f, r in seen.facts.fixed if r.startswith("passes")]
    assert features.tolist() == seen.facts.axis(model[0].weight, 0).features.tolist()
    assert reason.startswith(f"passes through {name}")
    assert name in seen.reasons[output]


def test_the_reason_goes_on_to_what_reads_the_output():
    model = Chain(nn.GELU())
    facts = follow(model, torch.randn(2, 5))
    reasons = {feature: reason for features, reason in facts.fixed for feature in features.tolist()}
    assert {reasons[f] for f in facts.axis(model.down.weight, 1).features.tolist()} == {"passes through gelu"}
    assert {reasons[f] for f in facts.axis(model.up.weight, 1).features.tolist()} == {"reads the model's inputs"}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Fails(nn.Module):
    def forward(self, x):
        raise KeyError("inside")


@pytest.mark.parametrize("where", ["in a module", "in the block", "not at all"])
def test_nothing_stays_registered_on_the_model(where):
    model = Chain(nn.Sequential(LlamaRMSNorm(8), Fails() if where == "in a module" else nn.Identity()))
    attributes = {module: sorted(vars(module)) for module in model.modules()}

    def run():
        with followed(model) as seen:
            assert hooks(model) > 0
            model(torch.randn(2, 5))
            if where == "in the block":
                raise KeyError("inside")
        return seen

    if where == "not at all":
        count = run().facts.count
    else:
        with pytest.raises(KeyError, match="inside"):
            run()
    assert hooks(model) == 0
    assert {module: sorted(vars(module)) for module in model.modules()} == attributes
    if where == "not at all":
        model(torch.randn(2, 5))
        assert count == run().facts.count


def test_outputs_are_those_without_following():
    model, x = Chain(LlamaRMSNorm(8)), torch.randn(2, 5)
    expected = model(x)
    with followed(model):
        found = model(x)
    assert torch.equal(found, expected)


def test_a_rule_that_crashes_is_told_once_and_costs_the_symmetry(monkeypatch, caplog):
    def broken(call):
        raise ZeroDivisionError("a fault of the rule")

    monkeypatch.setattr(following, "_FAILED", set())
    monkeypatch.setitem(RULES, "tanh", broken)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with caplog.at_level("WARNING", logger=following.__name__):
        for _ in range(2):
            symmetries, _ = find_symmetries(model, lambda model, x: model(x).square().mean(), torch.randn(4, 5))
    (told,) = [record.getMessage() for record in caplog.records if record.name == following.__name__]
    assert "rule of the operation 'tanh' failed with ZeroDivisionError: a fault of the rule" in told
    assert any("passes through tanh in a form that is not known" in symmetry.reason for symmetry in symmetries)
