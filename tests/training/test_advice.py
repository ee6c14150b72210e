"""The advice to give embeddings and output head a larger learning rate."""

import pytest
import torch

from hf_teleport import TeleportConfig
from hf_teleport.lab.optimizers import CombinedOptimizer
from hf_teleport.training.advice import larger_embedding_rate

from tiny_models import build
from tiny_runs import gpt2, llama, make, teleports

ADVICE = "Embeddings and output head have a learning rate of 0.01, the other weights 0.01."


def grouped(model, outer_rate, rate=0.01):
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outer = {parameter for end in ends for parameter in end.parameters()}
    others = [parameter for parameter in model.parameters() if parameter not in outer]
    return torch.optim.AdamW([{"params": others, "lr": rate}, {"params": list(outer), "lr": outer_rate}])


@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_it_is_given_while_no_embedding_learns_faster(make_model):
    model = make_model()
    assert larger_embedding_rate(model, torch.optim.AdamW(model.parameters(), lr=0.01)).startswith(ADVICE)
    assert larger_embedding_rate(model, grouped(model, 0.01)).startswith(ADVICE)
    assert larger_embedding_rate(model, grouped(model, 0.08)) == ""
    lower = larger_embedding_rate(model, grouped(model, 0.001))
    assert lower.startswith("Embeddings and output head have a learning rate of 0.001, the other weights 0.01.")


def test_none_for_an_optimizer_with_which_it_was_not_measured():
    model = llama()
    muon = torch.optim.Muon([model.model.layers[0].mlp.up_proj.weight], lr=0.02)
    others = torch.optim.AdamW([p for p in model.parameters() if p is not model.model.layers[0].mlp.up_proj.weight], lr=3e-4)
    assert larger_embedding_rate(model, CombinedOptimizer(muon, others)) == ""
    assert larger_embedding_rate(model, torch.optim.Adafactor(model.parameters())) == ""


def test_warm_up_has_lowered_all_rates_alike():
    model = llama()
    optimizer = grouped(model, 0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert larger_embedding_rate(model, optimizer).startswith(ADVICE)


def test_none_without_an_output_head_or_without_embeddings():
    for model in (build("bert", torch.float32)[0], torch.nn.Linear(3, 3)):
        assert larger_embedding_rate(model, torch.optim.AdamW(model.parameters())) == ""


def loaded():
    model = llama()
    model.config._name_or_path = model.name_or_path = "somewhere"
    return model


@pytest.mark.parametrize(
    ("model", "config", "given"),
    [
        (llama, teleports("basis"), True),
        (llama, TeleportConfig(steps=[2]), True),
        (llama, teleports(), True),
        (llama, teleports("null_space"), False),
        (loaded, teleports("basis"), False),
    ],
)
def test_a_new_models_run_begins_with_it(tmp_path, caplog, model, config, given):
    caplog.set_level("INFO", logger="hf_teleport")
    make(tmp_path, model(), config, max_steps=4).train()
    assert (ADVICE in caplog.text) is given


def test_a_resumed_run_does_not_repeat_it(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_teleport")

    def run():
        return make(tmp_path, llama(), teleports("basis"), max_steps=4, save_strategy="steps", save_steps=1)

    run().train()
    run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert caplog.text.count(ADVICE) == 1
