"""Models of every kind through the teleporter: a sample of the zoo, padding, experts, adapters, plain PyTorch."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter

from architectures import FAMILIES, NAMES, build, loss_fn
from teleports import measure
from tiny_models import build as build_tiny
from tiny_models import loss_fn as tiny_loss

# One of each family, and those that once broke: caches in eval mode, indices changed in place, experts, huge sensitivity.
SAMPLE = [
    *(next(iter(family)) for family in FAMILIES.values()),
    *("levit", "mask2former", "gpt_oss", "albert", "mamba2", "xlnet", "deit"),
]


def test_the_zoo_is_large():
    assert len(NAMES) == len(set(NAMES)) >= 70


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name):
    row = measure(name)
    assert row.loss_change < 1e-4
    assert row.loss_change_64 is None or row.loss_change_64 < 1e-10
    # Wav2Vec2's weight-normalised convolution, a tenth of so small a model, stays.
    assert row.movable >= (0.85 if name == "wav2vec2" else 0.9)
    assert row.agreement is None or row.agreement < 1e-5


def report_of(model, batch, loss=loss_fn, **settings):
    settings = {"learning_rate": 0.01, "max_loss_change": None, **settings}
    return Teleporter(model, TeleportConfig(**settings)).teleport([batch], loss)


def mean_square(model, x):
    return model(x).square().mean()


def by_name(report):
    return {layer.name: layer for layer in report.layers}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_ignored_labels(side):
    model, batch = build_tiny("llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, : 3 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[0, -3:] = 0
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    padded = {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}
    report = report_of(model, padded, tiny_loss)
    assert report.steps
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-7)


def test_packed_sequences():
    model, batch = build_tiny("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    packed = {"input_ids": batch["input_ids"], "position_ids": positions, "labels": batch["input_ids"]}
    report = report_of(model, packed, tiny_loss)
    assert report.steps
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-7)


def test_each_expert_has_a_null_space_of_its_own():
    model, batch = build("mixtral")
    report = report_of(model, {key: value[:1] for key, value in batch.items()})
    experts = by_name(report)["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.moved
    count, _, width = experts.shape
    # 7 tokens go to 2 experts each: whatever the routing, 14 rows are taken from the null spaces.
    assert (experts.input_dim, experts.null_dim) == (count * width, count * width - 14)
    assert by_name(report)["model.layers.1.mlp.gate"].moved


def test_an_expert_without_tokens_stays():
    model, batch = build("mixtral")
    batch = {key: value[:1, :1] for key, value in batch.items()}
    batch["labels"] = torch.tensor([[5]])
    experts = model.model.layers[1].mlp.experts.gate_up_proj
    before = experts.detach().clone()
    report_of(model, batch, lambda model, batch: model(batch["input_ids"]).logits.square().mean(), max_growth=None)
    changed = [not torch.equal(a, b) for a, b in zip(experts, before, strict=True)]
    assert sum(changed) <= model.config.num_experts_per_tok < len(changed)


def test_lora_moves_and_its_base_stays():
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = torch.randint(0, 40, (1, 5))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    report = report_of(model, {"input_ids": ids, "labels": ids})
    moved = {name for name, layer in by_name(report).items() if layer.moved}
    assert report.steps
    assert any("lora_A" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert all("lora" in name for name in moved)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_adapters_are_named_as_peft_users_name_them():
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = torch.randint(0, 40, (1, 5))
    for target, expected in ((["lora_B"], "lora_B"), (["q_proj"], "q_proj"), (r".*\.v_proj", "v_proj")):
        report = report_of(model, {"input_ids": ids, "labels": ids}, target_modules=target)
        movable = [layer for layer in report.layers if layer.movable]
        assert movable
        assert all(expected in layer.name for layer in movable)
        assert {layer.role for layer in movable} <= {"q", "v"}


class TTTLinear(nn.Module):
    """Test-time training with a linear inner model: its weight W is learned, token by token, while the sequence is read.

    theta_K makes what the inner model learns from, theta_V what it is to give, theta_Q what it is asked.
    """

    def __init__(self, size, rate=0.1):
        super().__init__()
        self.theta_k, self.theta_v, self.theta_q = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.initial = nn.Parameter(torch.randn(size, size) / size)
        self.rate = rate

    def forward(self, x):
        keys, values, queries = self.theta_k(x), self.theta_v(x), self.theta_q(x)
        inner = self.initial.expand(len(x), -1, -1)
        outputs = []
        for t in range(x.shape[1]):
            key = keys[:, t, :, None]
            error = inner @ key - values[:, t, :, None]
            inner = inner - self.rate * error @ key.mT
            outputs.append(inner @ queries[:, t, :, None])
        return torch.stack(outputs, 1).squeeze(-1)


def test_ttt_linear_projections_teleport():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), TTTLinear(16), nn.Linear(16, 3)).double()
    report = report_of(model, torch.randn(1, 4, 12).double(), mean_square, learning_rate=0.1, steps_per_batch=20)
    layers = by_name(report)
    assert all(layers[f"2.theta_{which}"].moved for which in "kvq")
    assert [layers[f"2.theta_{which}"].role for which in "kvq"] == ["k", "v", "q"]
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-10)
    assert report.grad_norm_after > 1.5 * report.grad_norm_before


class Block(nn.Module):
    """In the manner of timm: one fused qkv, scaled_dot_product_attention, drop path."""

    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(size, 3 * size), "proj": nn.Linear(size, size)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, 2 * size), "fc2": nn.Linear(2 * size, size)})

    def forward(self, x):
        batch, count, size = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, count, size))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def test_timm_style_and_multi_head_attention_models():
    timm = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Transpose(), Block(32, 4), Block(32, 4), nn.Linear(32, 2))
    torch_own = nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), nn.Linear(32, 2))
    for model, shape, role in ((timm, (1, 3, 16, 16), "3.attn.qkv"), (torch_own, (1, 6, 12), "1.self_attn.in_proj_weight")):
        report = report_of(model, torch.randn(shape), mean_square)
        assert report.grad_norm_after > 1.5 * report.grad_norm_before
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)
        layer = by_name(report)[role]
        assert (layer.moved, layer.role) == (True, "qkv")
        assert all(layer.moved for layer in report.layers if len(layer.shape) > 1 and layer.name not in ("0",))


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_recurrent_layers_are_named_with_a_reason():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    report = report_of(Reader(), torch.randn(3, 4, 6), mean_square)
    layers = by_name(report)
    assert layers["head"].moved
    assert "lstm" in layers["lstm.weight_hh_l0"].reason
