"""Runs that save memory or time: activation checkpointing, torch.compile, batches that shrink when memory runs out."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from hf_teleport import TeleportMixin, TeleportTrainer

from tiny_runs import (
    METHODS,
    VOCAB,
    Texts,
    assert_moved,
    flat,
    llama,
    looking,
    make,
    moved,
    teleports,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, reentrant, method):
    kind = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    usual = moved(make(tmp_path, config=teleports(method)))
    saving = moved(make(tmp_path, config=teleports(method), **kind))
    assert (usual.model.is_activation_checkpointing, saving.model.is_activation_checkpointing) == (False, True)
    assert saving.teleport_reports[0].steps == usual.teleport_reports[0].steps
    assert torch.allclose(flat(saving.model), flat(usual.model), atol=1e-5)


class Checkpointing(nn.Module):
    """Checkpoints in eval mode too."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, input_ids, labels=None, attention_mask=None):
        hidden = self.embed(input_ids)
        hidden = hidden + checkpoint(lambda h: self.down(self.up(h).relu()), hidden, use_reentrant=self.reentrant)
        logits = self.head(hidden)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_in_eval_mode_too(tmp_path, reentrant, method):
    run = moved(make(tmp_path, Checkpointing(reentrant), teleports(method)))
    assert {"down", "head"} <= {layer.name for layer in run.teleport_reports[0].layers if layer.moved}


@pytest.fixture
def graphs():
    """How many graphs were compiled since the test began: a function."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda *_: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


class AgainstEager:
    """Mixed into a trainer below the teleports: each step's loss, and what it is without a compiler."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            eager = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        compiled = super().training_step(model, inputs, num_items_in_batch)
        self.__dict__.setdefault("losses", []).append((float(compiled), float(eager)))
        return compiled


def small():
    return llama(num_hidden_layers=1)


def compiling(folder, graphs, model, **settings):
    # All batches are alike, so that nothing but a teleport could make the compiler start again.
    rows = [{name: ids[:6] for name, ids in row.items()} for row in Texts(16)]
    trainer_class = looking(graphs, TeleportMixin, AgainstEager, Trainer)
    return make(folder, model, teleports(), trainer_class, {"train_dataset": rows}, **settings)


def assert_compiled_once_and_never_stale(run, graphs):
    assert graphs() > 0
    assert run.looked == (graphs(), graphs())
    assert len(run.losses) == 8
    assert [compiled for compiled, _ in run.losses] == pytest.approx([eager for _, eager in run.losses], rel=1e-5)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_torch_compile_by_the_argument(tmp_path, graphs, precision):
    run = moved(compiling(tmp_path, graphs, small(), torch_compile_backend="aot_eager", **precision))
    assert hasattr(run.model_wrapped, "_orig_mod")
    assert_compiled_once_and_never_stale(run, graphs)


def compiled_model():
    return torch.compile(small(), backend="aot_eager")


def compiled_in_place():
    model = small()
    model.compile(backend="aot_eager")
    return model


def compiled_forward():
    model = small()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def compiled_part():
    model = small()
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="aot_eager")
    return model


@pytest.mark.parametrize("model", [compiled_model, compiled_in_place, compiled_forward, compiled_part])
def test_a_model_that_the_user_compiled(tmp_path, graphs, model):
    run = moved(compiling(tmp_path, graphs, model(), remove_unused_columns=False))
    assert_compiled_once_and_never_stale(run, graphs)


def test_the_names_of_a_compiled_model_are_those_of_the_model(tmp_path):
    names = [
        [layer.name for layer in make(tmp_path, model, remove_unused_columns=False).teleport().layers]
        for model in (small(), compiled_model())
    ]
    assert names[0] == names[1]


def test_smaller_batches_after_running_out_of_memory_in_the_middle(tmp_path):
    class Small(TeleportTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if self.state.global_step == 3 and len(inputs["input_ids"]) == 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    config = teleports("basis", steps=None, epochs=2, batch_size=None)
    run = make(tmp_path, config=config, trainer_class=Small, auto_find_batch_size=True)
    run.train()
    assert_moved(run, events=2)  # that before memory ran out is another run's
    size = run.get_teleport_dataloader(0).batch_size
    assert 0 < size == run._train_batch_size < 4
    assert run.state.global_step == 2 * -(-18 // size)
    assert [entry["step"] for entry in run.state.log_history if "teleport/steps" in entry] == [0, -(-18 // size)]
