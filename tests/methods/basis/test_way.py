"""The way home: after any number of events a model is what it was, but for what training has made of it."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.double import KeepDouble
from hf_teleport.methods.basis.symmetry import Part, Symmetry
from hf_teleport.methods.basis.turn import Turn
from hf_teleport.methods.basis.way import Way
from hf_teleport.optimizers.state import OptimizerState

from tiny_models import VOCAB, build, loss_fn

ALL = ["stream", "value_output", "query_key", "chain", "scaling"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
# With an offset of one in every gain, and per-head norms; with experts; with latent attention.
MORE = {
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SMALL,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=2,
        )
    ),
}
NAMES = ["gpt2", "llama", "bert", "t5", "vit", "mamba", *MORE]
DOUBLE = [name for name in NAMES if name != "mixtral"]  # whose experts run in float32 only


def made(name, dtype=torch.float64, uneven=True):
    """A tiny model and a batch; what is tied stays even, or its stream would not turn."""
    if name in MORE:
        torch.manual_seed(0)
        model = MORE[name]().to(dtype)
        ids = torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
    else:
        model, batch = build(name, dtype)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if uneven and parameter.dim() == 1:
            parameter.data += 0.3 * torch.rand_like(parameter)
    return model.eval(), batch


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def outputs(model, batch):
    with KeepDouble(), torch.no_grad():
        return model.eval()(**batch).logits


def turned(model, batch, optimizer=None, events=3, train=lambda: None, **settings):
    """A teleporter after some events of random turns, with training between."""
    teleporter = Teleporter(model, optimizer=optimizer)
    for seed in range(events):
        teleporter.config = TeleportConfig(**{"method": "basis", "basis": "random", "symmetries": ALL, "seed": seed, **settings})
        with KeepDouble():
            report = teleporter.teleport([batch], loss_fn)
        assert report.stopped_because == "steps_done"
        train()
    return teleporter


def training(model, batch, optimizer, steps=2):
    def train():
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()

    return train


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, torch.float64, 1e-12) for name in DOUBLE] + [(name, torch.float32, 1e-6) for name in NAMES],
)
def test_without_training_every_weight_is_what_it_was(name, dtype, tolerance):
    """Relative to the weight's largest element."""
    model, batch = made(name, dtype)
    before = weights(model)
    teleporter = turned(model, batch)
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(before, weights(model), strict=True))
    reports = teleporter.turn_back()
    assert reports
    assert not any(report.reason for report in reports)
    for a, b in zip(before, weights(model), strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    assert teleporter.turn_back() == []


@pytest.mark.parametrize("name", DOUBLE)
def test_after_training_in_turned_bases_the_outputs_stay(name):
    model, batch = made(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    teleporter = turned(model, batch, optimizer, train=training(model, batch, optimizer))
    before = outputs(model, batch)
    reports = teleporter.turn_back()
    assert any(not report.reason for report in reports)
    torch.testing.assert_close(outputs(model, batch), before, atol=1e-10, rtol=1e-10)


def test_gains_that_were_folded_come_back_as_they_were():
    model, batch = made("llama")
    gains = [p.detach().clone() for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    teleporter = turned(model, batch, optimizer, train=training(model, batch, optimizer))
    now = [p for p in model.parameters() if p.dim() == 1]
    assert not any(torch.allclose(p, gain, atol=1e-3) for p, gain in zip(now, gains, strict=True))
    teleporter.turn_back()
    for gain, p in zip(gains, now, strict=True):
        torch.testing.assert_close(p.data, gain, atol=1e-14, rtol=1e-14)


def test_a_gain_that_training_made_zero_goes_into_its_readers():
    model, batch = made("llama")
    teleporter = turned(model, batch)
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    before = outputs(model, batch)
    assert not any(report.reason for report in teleporter.turn_back())
    torch.testing.assert_close(outputs(model, batch), before, atol=1e-10, rtol=1e-10)


def test_where_a_bias_would_have_to_be_divided_by_zero_the_stream_stays_turned():
    model, batch = made("vit")
    teleporter = turned(model, batch)
    with torch.no_grad():
        model.vit.layernorm.weight[3] = 0
    before, turned_weight = outputs(model, batch), model.classifier.weight.detach().clone()
    reports = {report.kind: report.reason for report in teleporter.turn_back()}
    assert reports["stream"] == (
        "training has brought vit.layernorm.weight near zero since it was turned, and it cannot be folded"
    )
    assert not reports["value_output"]
    assert torch.equal(model.classifier.weight, turned_weight)
    torch.testing.assert_close(outputs(model, batch), before, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        model.vit.layernorm.weight[3] = 1
    assert [report.kind for report in teleporter.turn_back() if not report.reason] == ["stream"]


def test_a_tied_head_whose_gain_was_trained_keeps_the_stream_turned_and_says_so():
    model, batch = made("gpt2", uneven=False)
    before = weights(model)
    teleporter = turned(model, batch)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 0.1
    ended = outputs(model, batch)
    stays = {report.kind: report.reason for report in teleporter.turn_back()}
    assert stays["stream"] == ("training has made transformer.ln_f.weight uneven since it was turned, and it cannot be folded")
    assert not stays["value_output"]
    torch.testing.assert_close(outputs(model, batch), ended, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] -= 0.1
    assert not any(report.reason for report in teleporter.turn_back())
    for a, b in zip(before, weights(model), strict=True):
        torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_momentum_is_that_of_an_untouched_run(name):
    """With a learning rate of zero, the optimizer's averages are those of gradients at the first weights."""
    uneven = name == "llama"
    plain, batch = made(name, uneven=uneven)
    model, _ = made(name, uneven=uneven)
    untouched, optimizer = (torch.optim.Adam(each.parameters(), lr=0.0) for each in (plain, model))
    with KeepDouble():
        training(plain, batch, untouched, steps=3)()
        train = training(model, batch, optimizer, steps=1)
        train()
        turned(model, batch, optimizer, events=2, train=train).turn_back()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if p.dim() > 1:  # a gain's gradient in another basis is unknown
            scale = untouched.state[q]["exp_avg"].abs().max()
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], untouched.state[q]["exp_avg"], atol=1e-9 * scale, rtol=1e-9)
            assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())
            # A rotation keeps the sum of squares along an axis; only gains that are folded and unfolded do not.
            if name == "gpt2":
                sums = [s.state[x]["exp_avg_sq"].sum() for s, x in ((optimizer, p), (untouched, q))]
                torch.testing.assert_close(*sums, rtol=1e-9, atol=0)


def test_training_goes_on_from_the_weights_that_were_turned_back():
    """The next momentum step is the turned one: an optimizer that does not see the basis ends where it would have."""
    ends = []
    for home in (False, True):
        model, batch = made("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        way, frozen = Way(), [p for p in model.parameters() if p.dim() == 1]
        for gain in frozen:  # a trained gain has another gradient in another basis
            gain.requires_grad_(False)
            gain.data.fill_(1)
        train = training(model, batch, optimizer, steps=3)
        train()
        matrix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
        attention = model.model.layers[0].self_attn
        positions = torch.arange(8).reshape(1, 1, 8)
        twice = torch.arange(16).reshape(1, 2, 8)  # two query heads share the values of one
        parts = [Part(attention.v_proj.weight, 0, positions, False), Part(attention.o_proj.weight, 1, twice, True)]
        symmetry = Symmetry("value_output", "v", 1, 8, parts=parts)
        if home:
            state = OptimizerState(optimizer)
            turn = Turn({symmetry: matrix[None]})
            turn.carry_out(state)
            way.add(turn)
            train()
            way.turn_back(state=state)
        else:
            train()
        train()
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_the_sum_of_two_runs_changes_is_that_of_untouched_runs():
    """Task arithmetic. Plain SGD does not see a rotation, so runs that turn and come home change the weights as those that don't.

    Gains are 1 and not trained: a gain that is folded scales the gradients of its readers.
    """
    start = weights(made("llama", uneven=False)[0])
    sums, turned_sum = {}, None
    for turns in (False, True):
        changes = []
        for seed in (1, 2):
            model, _ = made("llama", uneven=False)
            ids = torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(seed))
            batch = {"input_ids": ids, "labels": ids}
            train = training(model, batch, torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1))
            with KeepDouble():
                train()
                if turns:
                    teleporter = turned(model, batch, train=train, symmetries=[kind for kind in ALL if kind != "scaling"])
                    turned_sum = weights(model)
                    assert "stream" in {report.kind for report in teleporter.turn_back()}
                else:
                    for _ in range(3):
                        train()
            changes.append([a - b for a, b in zip(weights(model), start, strict=True)])
        sums[turns] = [base + one + two for base, one, two in zip(start, *changes, strict=True)]
    for one, other, base in zip(sums[True], sums[False], start, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        assert base.dim() == 1 or not torch.allclose(other, base, atol=1e-4)
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(turned_sum, sums[True], strict=True))


def test_what_is_saved_brings_a_model_home_as_the_run_would_have():
    model, batch = made("deepseek")
    teleporter = turned(model, batch)
    names = {p: name for name, p in model.named_parameters()}
    state = teleporter.tracker.way.state_dict(names)
    loaded = copy.deepcopy(model)
    Way.from_state_dict(state, dict(loaded.named_parameters())).turn_back()
    teleporter.turn_back()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(loaded), strict=True))
    assert Way().state_dict({}) == {}
    assert not Way.from_state_dict({}, {})
    with pytest.raises(ValueError, match="made in another model: this one has no parameter"):
        Way.from_state_dict(state, {})


def test_turns_of_other_blocks_of_the_same_features_are_undone_in_reverse():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(2))
    before = first.detach().clone(), second.detach().clone()
    way = Way()

    def turn(kind, positions):
        parts = [Part(first, 0, positions, False), Part(second, 1, positions, True)]
        symmetry = Symmetry(kind, "first", len(positions), positions.shape[-1], parts=parts)
        matrices = torch.linalg.qr(torch.randn(len(positions), symmetry.size, symmetry.size, dtype=torch.float64)).Q
        turned = Turn({symmetry: matrices})
        turned.carry_out()
        way.add(turned)

    whole, halves, part = torch.arange(6).reshape(1, 1, 6), torch.arange(6).reshape(2, 1, 3), torch.arange(2).reshape(1, 1, 2)
    for positions in (whole, whole, halves, part, whole):
        turn("chain", positions)
    assert [leg.symmetry.size for leg in way.legs] == [6, 3, 2, 6]
    way.turn_back()
    torch.testing.assert_close(first.data, before[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(second.data, before[1], atol=1e-12, rtol=0)


def test_an_event_that_is_undone_leaves_no_trace_in_the_way(monkeypatch):
    model, batch = made("llama")
    teleporter = Teleporter(model, TeleportConfig(method="basis", basis="random"))
    monkeypatch.setattr(TeleportConfig, "allows", lambda *losses: False)
    report = teleporter.teleport([batch], loss_fn)
    assert report.rolled_back
    assert not teleporter.tracker.way
