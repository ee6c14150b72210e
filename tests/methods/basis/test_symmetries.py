"""Symmetries of tiny Transformers models: turned, they give the same logits, also as a checkpoint in plain Transformers."""

import collections
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_teleport.layers.double import KeepDouble
from hf_teleport.methods.basis.bases import Random, balance
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.turn import Turn

from architectures import build, floats, loss_fn
from tiny_models import build as build_tiny

V, QK = "value_output", "query_key"

# For each kind the number of blocks; of 'scaling', of layers. With all gains and biases perturbed.
EXPECTED = {
    "llama": {"stream": 1, V: 4, "scaling": 2},
    "qwen2": {"stream": 1, V: 4, "scaling": 2},
    "qwen3": {"stream": 1, V: 4, "scaling": 2},
    "mistral": {"stream": 1, V: 4, "scaling": 2},
    "gemma": {V: 4, "scaling": 2},
    "gemma2": {V: 4, "scaling": 2},
    "gpt2": {V: 8, QK: 8},
    "opt": {"stream": 1, "chain": 1, V: 8, QK: 8, "scaling": 2},
    "gpt_neox": {"stream": 1, V: 8, QK: 8},
    "phi": {"stream": 1, V: 4, QK: 4},
    "bloom": {V: 8, QK: 8},
    "falcon": {V: 2},
    "mixtral": {"stream": 1, V: 4, "scaling": 2},
    "deepseek_v3": {"stream": 1, V: 8, "chain": 4, "scaling": 3},
    "vit": {"stream": 1, V: 8, QK: 8},
    "deit": {"stream": 1, V: 8, QK: 8},
    "bert": {V: 8, QK: 8},
    "roberta": {V: 8, QK: 8},
    "albert": {"stream": 1, V: 4, QK: 4},
    "t5": {V: 24, QK: 24, "scaling": 4},
    "bart": {V: 24, QK: 24},
    "whisper": {V: 24, QK: 24},
    "clip": {"stream": 1, V: 16, QK: 16},
}


def perturbed(name, dtype=torch.float64):
    """A model with uneven gains and biases."""
    model, batch = build(name, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model.eval(), batch


def find(model, batch, **options):
    frozen = {p: "frozen" for p in model.parameters() if not p.requires_grad}
    with KeepDouble():
        symmetries, reasons = find_symmetries(model, loss_fn, batch, frozen, **options)
    return [s for s in symmetries if not s.reason], [s for s in symmetries if s.reason], reasons


def turn_of(used, seed=0):
    basis = Random(used, seed)
    return Turn({s: balance(s) if s.kind == "scaling" else basis.choose(s) for s in used})


def outputs(model, batch):
    """The tensors that a user reads: logits, or the scores of pairs."""
    with torch.no_grad(), KeepDouble():
        found = model(**batch)
    return [found[key] for key in found if key in ("loss", "logits") or key.startswith("logits_")]


def other_inputs(batch):
    """A batch of the same shape with other contents."""
    generator = torch.Generator().manual_seed(2)
    other = {}
    for key, value in batch.items():
        if key in ("input_ids", "labels") and value.dim() == 2:
            other[key] = torch.randint(3, 58, value.shape, generator=generator)
        else:
            random = torch.is_tensor(value) and value.is_floating_point()
            other[key] = torch.randn(value.shape, generator=generator).to(value) if random else value
    return other


def difference(before, after):
    assert len(before) == len(after) > 1
    return max(float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True))


def count(used):
    blocks = collections.Counter()
    for s in used:
        blocks[s.kind] += 1 if s.kind == "scaling" else s.blocks
    return dict(blocks)


def why(left, kind):
    return {s.reason for s in left if s.kind == kind}


@pytest.fixture(scope="module", params=EXPECTED)
def found(request):
    model, batch = perturbed(request.param)
    return request.param, model, batch, *find(model, batch)


def test_logits_after_a_turn_are_those_before_and_taking_back_restores_the_weights(found):
    name, model, batch, used, _, reasons = found
    assert count(used) == EXPECTED[name]
    inputs = [batch, other_inputs(batch)]
    before = [outputs(model, i) for i in inputs]
    weights = copy.deepcopy(model.state_dict())
    turns = []
    for seed in (0, 1):
        turns.append(turn_of(used, seed))
        turns[-1].carry_out()
        assert all(difference(b, outputs(model, i)) < 1e-10 for b, i in zip(before, inputs, strict=True))
        turned = {part.parameter for s in used for part in s.parts if s.kind != "scaling" and part.parameter.any()}
        assert all((p - weights[n]).norm() > 1e-2 * p.norm() for n, p in model.named_parameters() if p in turned)
    for turn in reversed(turns):
        turn.take_back()
    for n, p in model.named_parameters():
        assert (p - weights[n]).abs().max() <= 1e-12, n
        assert (p in reasons) == (p not in {q for s in used for q in s.parameters}), n


def reloaded(model, folder, batch):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float64).to(torch.float64).eval()
    loaded.set_experts_implementation("eager")
    return outputs(loaded, batch)


def test_a_saved_checkpoint_is_a_plain_one(found, tmp_path):
    _, model, batch, used, *_ = found
    before = reloaded(model, tmp_path / "before", batch)
    turn = turn_of(used)
    turn.carry_out()
    after = reloaded(model, tmp_path / "after", batch)
    turn.take_back()
    assert difference(before, after) < 1e-10


@pytest.mark.parametrize("name", EXPECTED)
def test_float32_agrees_to_its_precision(name):
    model, batch = perturbed(name, torch.float32)
    used, *_ = find(model, batch)
    assert count(used) == EXPECTED[name]
    before = outputs(model, batch)
    turn_of(used).carry_out()
    assert difference(before, outputs(model, batch)) < 1e-4


# --- Reasons -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gpt2", "stream", "the gain of transformer.ln_f.weight is not uniform and cannot be folded"),
        ("gemma", "stream", "the gain of model.norm.weight is not uniform and cannot be folded"),
        ("falcon", "stream", "the gain of transformer.ln_f.weight is not uniform"),
        ("bert", "stream", "the gain of bert.embeddings.LayerNorm.weight is not uniform and cannot be folded"),
        ("gemma2", "stream", "the gain of model.layers.0.post_attention_layernorm.weight is not uniform"),
        ("llama", QK, "as by a rotary embedding"),
        ("mistral", QK, "as by a rotary embedding"),
        ("qwen3", QK, "model.layers.0.self_attn.q_norm.weight is not uniform and scales each feature by its own factor"),
    ],
)
def test_reasons_name_what_is_in_the_way(name, kind, reason):
    _, left, _ = find(*perturbed(name))
    assert any(reason in r for r in why(left, kind)), why(left, kind)


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma", "gemma2"])
def test_the_stream_turns_while_gains_are_uniform_and_names_those_that_would_stop_it(name):
    model, batch = build(name, torch.float64)
    model.eval()
    used, *_ = find(model, batch)
    (stream,) = [s for s in used if s.kind == "stream" and s.size == 32]
    assert stream.blocking
    before = outputs(model, batch)
    turn_of(used).carry_out()
    assert difference(before, outputs(model, batch)) < 1e-10
    # What it names is enough: with these made uneven it does not turn.
    with torch.no_grad():
        stream.blocking[0].add_(torch.rand(32))
    assert not [s for s in find(model, batch)[0] if s.kind == "stream" and s.size == 32]


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2"])
def test_rounded_gains_let_the_stream_turn_and_are_made_uniform(name):
    model, batch = perturbed(name)
    used, *_ = find(model, batch, round_gains=True)
    (stream,) = [s for s in used if s.kind == "stream" and s.size == 32]
    gains = stream.rounded
    means = [float(gain.detach().mean()) for gain in gains]
    weights = copy.deepcopy(model.state_dict())
    turn = turn_of(used)
    assert gains
    assert not turn.exact
    turn.carry_out()
    for gain, mean in zip(gains, means, strict=True):
        torch.testing.assert_close(gain.data, torch.full_like(gain, mean))
    # Apart from the rounding it is exact.
    turned = outputs(model, batch)
    turn.take_back()
    for n, p in model.named_parameters():
        assert (p - weights[n]).abs().max() <= 1e-12, n
    with torch.no_grad():
        for gain, mean in zip(gains, means, strict=True):
            gain.fill_(mean)
    assert difference(outputs(model, batch), turned) < 1e-10


def test_nothing_is_rounded_where_all_can_be_folded():
    model, batch = perturbed("llama")
    used, *_ = find(model, batch, round_gains=True)
    assert turn_of(used).exact
    assert count(used) == EXPECTED["llama"]


# --- What must stay ------------------------------------------------------------------------------------------------------


def test_frozen_parameters_keep_what_they_touch():
    model, batch = perturbed("llama")
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.requires_grad_(False)
    used, left, reasons = find(model, batch)
    assert count(used) == {V: 2, "scaling": 2}
    assert why(left, "stream") == {"frozen"}
    assert reasons[layer.self_attn.o_proj.weight] == "frozen"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    turn_of(used).carry_out()
    frozen = {p for s in left if s.reason == "frozen" for p in s.parameters}
    assert torch.equal(layer.self_attn.o_proj.weight, before["model.layers.0.self_attn.o_proj.weight"])
    assert model.model.norm.weight in frozen
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"]), "and is not folded"


@pytest.mark.parametrize("part", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_gain_that_must_stay_cannot_be_folded(part):
    model, batch = perturbed("llama")
    with KeepDouble():
        symmetries, reasons = find_symmetries(model, loss_fn, batch, {model.get_parameter(part): "must stay"})
    assert count(s for s in symmetries if not s.reason) == {V: 4, "scaling": 2}
    assert reasons[model.get_parameter(part)] == "must stay"


def test_weights_that_must_stay_leave_the_others():
    model, batch = perturbed("gpt2")
    attention = model.transformer.h[1].attn
    with KeepDouble():
        symmetries, reasons = find_symmetries(model, loss_fn, batch, {attention.c_attn.weight: "not selected"})
    assert count(s for s in symmetries if not s.reason) == {V: 4, QK: 4}
    assert reasons[attention.c_attn.weight] == "not selected"
    assert {s.reason for s in symmetries if s.kind == QK and s.reason} == {"not selected"}


def test_finding_changes_no_weight_and_leaves_no_gradient():
    model, batch = perturbed("gpt2")
    before = copy.deepcopy(model.state_dict())
    find(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_turn_between_their_factors_and_the_base_stays(targets):
    model, batch = build_tiny("llama")
    model = get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).double().eval()
    used, left, reasons = find(model, batch)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {(s.kind, s.blocks, s.size) for s in used} == {("chain", 1, 3)}
    assert len(used) == len(adapters) // 2
    for s in used:
        a, b = sorted((n for n, p in adapters.items() if p in set(s.parameters)))
        assert a.replace("lora_A", "lora_B") == b
    before = outputs(model, batch)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in adapters}
    turn_of(used).carry_out()
    assert difference(before, outputs(model, batch)) < 1e-10
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert set(reasons) == {p for n, p in model.named_parameters() if n in base}
    assert {s.reason for s in left if s.kind == "stream" and s.size == 32} == {"frozen"}


def test_merged_adapters_give_the_same_model():
    model, batch = build_tiny("llama")
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False)).double().eval()
    used, *_ = find(model, batch)
    turned = copy.deepcopy(model)
    expected = outputs(turned.merge_and_unload(), batch)
    turn_of(used).carry_out()
    assert difference(expected, outputs(model.merge_and_unload(), batch)) < 1e-10
    assert all(t.isfinite().all() for t in floats(expected))
