"""What an event will cost, said before it runs."""

import logging
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.event.cost import Cost, cost_warning, share_of_run
from hf_teleport.lab.data import TensorRows
from hf_teleport.methods import METHODS

ROWS = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **sizes))


def loss_fn(model, batch):
    return model(**batch).loss


def trainer(folder, **settings):
    arguments = TeleportTrainingArguments(
        folder,
        teleport_method="null_space",
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return TeleportTrainer(llama(), arguments, train_dataset=TensorRows(input_ids=ROWS, labels=ROWS))


@pytest.mark.parametrize("method", ["null_space", "basis", "level_set"])
def test_an_estimate_is_of_passes_decompositions_and_copies(method):
    model, config = llama(), TeleportConfig(num_batches=3, steps_per_batch=2).for_method(method)
    cost = Teleporter(model, config).check({"input_ids": ROWS[:4], "labels": ROWS[:4]}, loss_fn).cost
    assert cost.pass_seconds > 0
    assert cost.event_seconds >= METHODS[method].passes(config) * cost.pass_seconds
    if method != "basis":
        assert cost.event_bytes == METHODS[method].copies(config) * 4 * model.num_parameters()


def test_what_is_frozen_costs_no_memory():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    cost = Teleporter(model, TeleportConfig()).check({"input_ids": ROWS[:4], "labels": ROWS[:4]}, loss_fn).cost
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.event_bytes == METHODS["null_space"].copies(TeleportConfig()) * 4 * trained


def test_a_null_space_of_each_batch_takes_as_many_decompositions(monkeypatch):
    model, batch = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(16, 64)
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))  # whatever is timed takes one second

    def seconds(**settings):
        config = TeleportConfig(num_batches=5, steps_per_batch=2, **settings)
        cost = Teleporter(model, config).check(batch, lambda model, batch: model(batch).square().mean()).cost
        return cost.event_seconds - METHODS["null_space"].passes(config) * cost.pass_seconds

    # Two layers, of which one is decomposed to judge by.
    assert seconds(scope="joint") == pytest.approx(2)
    assert seconds(scope="batch") == pytest.approx(10)


def test_shares():
    assert share_of_run(10.0, 100, 0.5) == 0.2
    assert share_of_run(10.0, 0, 0.5) == math.inf
    assert str(Cost(0.1, 12.0, 2**30)) == "12.0 s and 1.0 GiB beside a batch's activations"


def test_a_run_says_what_its_teleports_cost_and_warns_of_a_large_share(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_steps=4, teleport_num_batches=1, teleport_steps_per_batch=1).train()
    assert "of the time of training itself" in caplog.text
    assert cost_warning([Cost(1.0, 50.0, 0)], events=1, training_passes=1e6) == ""
    assert "about 5 % of the time of training itself" in cost_warning([Cost(1.0, 50.0, 0)], events=1001, training_passes=1e6)
