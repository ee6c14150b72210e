"""Adapters of PEFT in the trainer: what moves, when, and that merged and saved models are ordinary ones."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_teleport import TeleportConfig, Teleporter

from tiny_runs import Texts, llama, make, pad, teleports

TARGETS = ["q_proj", "v_proj"]


def adapted(base=None, **settings):
    torch.manual_seed(0)
    return peft.get_peft_model(base or llama(), peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings}))


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 9)[None]).logits


def loss_fn(model, batch):
    return model(**batch).loss


def teleported(model, method, **settings):
    """A report of an event, on a few tokens."""
    batch = pad(Texts(1).rows)
    config = TeleportConfig(steps_per_batch=2, **settings).for_method(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Teleporter(model, config, optimizer=optimizer).teleport([batch], loss_fn)


def test_a_run_moves_adapters_alone_and_what_it_leaves_is_an_ordinary_model(tmp_path):
    model = adapted()
    before = frozen(model)
    trainer = make(tmp_path, model=model, max_steps=4)
    trainer.train()
    by_method = {report.method: report for report in trainer.teleport_reports}
    for report in by_method.values():
        assert report.steps
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)
        assert {layer.name for layer in report.layers if layer.movable} == {
            name.removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad
        }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    trainer.save_model()
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


def test_fresh_adapters_have_nothing_to_climb_and_a_warmup_helps(tmp_path):
    """With more tokens than ranks B has no null space, and while B is zero no gradient reaches A."""
    few = {"steps": None, "epochs": 1, "num_batches": 1, "batch_size": 2}
    for warmup_steps in (0, 2):
        config = teleports("null_space", warmup_steps=warmup_steps, **few)
        trainer = make(tmp_path, model=adapted(), config=config, max_steps=3)
        trainer.train()
        (report,) = trainer.teleport_reports
        moved = {layer.name.split(".")[-2] for layer in report.layers if layer.moved}
        assert moved == ({"lora_A"} if warmup_steps else set())
        if not moved:
            assert report.stopped_because == "no_direction"


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_change_of_basis_turns_each_pair_and_no_output(settings):
    model = adapted(**{"init_lora_weights": False, **settings})
    before = logits(model)
    report = teleported(model, "basis")
    turned = [symmetry for symmetry in report.symmetries if not symmetry.reason]
    assert {(symmetry.kind, symmetry.size) for symmetry in turned} == {("chain", 4)}
    assert len(turned) == 2 * len(TARGETS)
    assert torch.allclose(logits(model), before, atol=1e-6), "for tokens that the event did not see"


# What PEFT computes its weights of, and what then moves: by the null space of inputs, and by a change of basis.
KINDS = {
    "dora": (peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True, init_lora_weights=False), True, True),
    "loha": (peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False), False, True),
    "ia3": (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False), False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_move_or_are_named_with_the_reason(kind):
    config, *expected = KINDS[kind]
    for method, moves in zip(["null_space", "basis"], expected, strict=True):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(hidden_size=64), config)
        before = frozen(model)
        report = teleported(model, method, energy_threshold=0.99, max_loss_change=None)
        assert bool(report.steps) is moves, report.stopped_because
        assert all(layer.moved or layer.reason for layer in report.layers)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_head_that_is_trained_beside_the_adapters_moves_too():
    report = teleported(adapted(modules_to_save=["lm_head"], init_lora_weights=False), "null_space")
    assert [layer.name for layer in report.layers if layer.moved and "lora" not in layer.name] == [
        "base_model.model.lm_head.modules_to_save.default"
    ]
    assert not [layer for layer in report.layers if layer.moved and layer.name.endswith("base_layer")]
