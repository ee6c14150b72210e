import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_teleport.models import (
    CNNConfig,
    CNNForImageClassification,
    MLPConfig,
    MLPForImageClassification,
    SeriesConfig,
    SeriesTransformer,
)

MODELS = {
    "mlp": lambda: MLPForImageClassification(MLPConfig(image_size=8, num_channels=2, hidden_sizes=(12, 9), num_labels=3)),
    "cnn": lambda: CNNForImageClassification(CNNConfig(image_size=8, channels=(2, 4, 6), num_labels=3)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_loss_logits_and_round_trip(make, tmp_path):
    model = make().eval()
    images, labels = torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    outputs = model(pixel_values=images, labels=labels)
    assert outputs.logits.shape == (5, 3)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixel_values=images).logits, outputs.logits)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_accumulated_batches_are_averaged(make, tmp_path):
    rows = [{"pixel_values": torch.randn(2, 8, 8), "labels": torch.tensor(i % 3)} for i in range(8)]
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = make()
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


def test_shapes_of_the_paper():
    mlp = MLPForImageClassification(MLPConfig(num_labels=10))
    assert [tuple(p.shape) for n, p in mlp.named_parameters() if "weight" in n] == [(1024, 784), (1024, 1024), (10, 1024)]
    cnn = CNNForImageClassification(CNNConfig(num_labels=10))
    assert [tuple(p.shape) for n, p in cnn.named_parameters() if "weight" in n][:3] == [
        (16, 3, 3, 3),
        (32, 16, 3, 3),
        (64, 32, 3, 3),
    ]
    assert cnn(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)


def test_forecaster_learns_from_the_past_and_round_trips(tmp_path):
    config = SeriesConfig(
        channels=2, context=6, horizon=3, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = SeriesTransformer(config).eval()
    inputs, labels = torch.randn(5, 6, 2), torch.randn(5, 3, 2)
    outputs = model(inputs=inputs, labels=labels)
    assert outputs.logits.shape == (5, 3, 2)
    torch.testing.assert_close(outputs.loss, (outputs.logits - labels).square().mean())
    assert model(inputs=inputs).loss is None
    # Every time step is attended to, and its place in the window counts.
    for changed in (inputs.index_fill(1, torch.tensor([0]), 1.0), inputs.flip(1)):
        assert not torch.allclose(model(inputs=changed).logits, outputs.logits)
    model.save_pretrained(tmp_path)
    loaded = SeriesTransformer.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(inputs=inputs).logits, outputs.logits)
    loaded.train()
    optimizer = torch.optim.Adam(loaded.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loaded(inputs=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * outputs.loss


def test_forecaster_says_which_heads_do_not_divide_its_width():
    with pytest.raises(ValueError, match="num_attention_heads = 3 is not allowed; allowed: a divisor of hidden_size = 8"):
        SeriesConfig(hidden_size=8, num_attention_heads=3)
