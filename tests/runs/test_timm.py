"""Models of timm: a convolutional one and a vision transformer, in a loop of one's own and in the trainer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer

from tiny_runs import arguments

# A torchvision that does not fit torch fails with errors of its own.
timm = pytest.importorskip("timm", reason="timm, or its torchvision, does not import: docs/timm.md", exc_type=Exception)

MODELS = {
    "resnet10t": {"num_classes": 3},
    "vit_tiny_patch16_224": {"num_classes": 3, "img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48},
}


class Labelled(nn.Module):
    """A model as Trainer takes it: from named inputs to a loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def build(name):
    torch.manual_seed(0)
    return timm.create_model(name, **MODELS[name]).train()


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(i % 3)} for i in range(count)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", MODELS)
def test_in_a_loop(name):
    model = build(name)
    batch = torch.stack([row["pixel_values"] for row in rows(2)]), torch.tensor([0, 1])
    report = Teleporter(model, TeleportConfig(steps_per_batch=2)).teleport([batch], loss_fn)
    assert report.steps
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)
    assert report.grad_norm_after > report.grad_norm_before
    followed = {layer.name for layer in report.layers if layer.movable}
    weights = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1 and name.endswith(".weight")}
    assert weights <= followed, "every convolution and every linear layer"


def test_the_stream_of_a_vision_transformer_turns():
    model = build("vit_tiny_patch16_224").double()
    images = torch.stack([row["pixel_values"] for row in rows(6)]).double()
    before = model.eval()(images)
    config = TeleportConfig(method="basis")
    report = Teleporter(model, config, optimizer=torch.optim.AdamW(model.parameters())).teleport(
        [(images[:2], torch.tensor([0, 1]))], loss_fn
    )
    assert {symmetry.kind for symmetry in report.symmetries if not symmetry.reason} == {"stream", "value_output", "query_key"}
    assert torch.allclose(model.eval()(images), before, rtol=1e-9, atol=1e-12), "for all images"


@pytest.mark.parametrize("name", MODELS)
def test_in_the_trainer(name, tmp_path):
    config = TeleportConfig(steps=[1], num_batches=1, batch_size=2, steps_per_batch=2)
    settings = arguments(tmp_path, max_steps=3, learning_rate=1e-3)
    trainer = TeleportTrainer(Labelled(build(name)), settings, train_dataset=rows(12), teleport_config=config)
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert trainer.teleport_reports[0].steps
    trainer.save_model()
    loaded = Labelled(build(name))
    Trainer(loaded, settings)._load_from_checkpoint(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))
