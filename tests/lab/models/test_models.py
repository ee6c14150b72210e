from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.lab.data import load_series
from hf_teleport.lab.models import (
    CausalLMConfig,
    CNNConfig,
    CNNForImageClassification,
    MLPConfig,
    MLPForImageClassification,
    ResidualCNNConfig,
    ResidualCNNForImageClassification,
    SequenceClassifierConfig,
    SequenceRegressorConfig,
    SeriesConfig,
    SeriesTransformer,
    TransformerForCausalLM,
    TransformerForSequenceClassification,
    TransformerForSequenceRegression,
)
from hf_teleport.lab.models.block import TransformerBlock

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
ROWS, VOCAB = 8, 19


def images(channels=2):
    return {"pixel_values": torch.randn(ROWS, channels, 8, 8), "labels": torch.arange(ROWS) % 3}


def pixels():
    return {"inputs": torch.randn(ROWS, 6, 1), "labels": torch.arange(ROWS) % 3}


def series():
    return {"inputs": torch.randn(ROWS, 6, 2), "labels": torch.randn(ROWS, 6, 2)}


def tokens():
    ids = torch.randint(VOCAB, (ROWS, 6))
    # Rows have from 1 to 5 labels, so that a mean of means over batches is not the mean over tokens.
    counts = torch.arange(ROWS).unsqueeze(1) % 5
    labels = ids.masked_fill(torch.arange(6) > counts + 1, -100)
    return {"input_ids": ids, "labels": labels}


def class_loss(logits, labels):
    return F.cross_entropy(logits, labels)


def next_token_loss(logits, labels):
    """The mean over the labelled tokens of minus the log-probability that the position before gives them."""
    log_probabilities = logits.log_softmax(-1)
    terms = [
        -log_probabilities[row, place - 1, labels[row, place]]
        for row in range(labels.shape[0])
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    return torch.stack(terms).mean()


@dataclass
class Case:
    """A tiny network, a batch for it, and what its loss should be."""

    auto: Any
    model: type[PreTrainedModel]
    config: Any
    batch: Any
    loss: Any
    shape: tuple[int, ...]

    def build(self, dtype=torch.float32):
        torch.manual_seed(0)
        return self.model(self.config).to(dtype)

    def data(self, dtype=torch.float32, rows=ROWS):
        torch.manual_seed(1)
        return {k: (v.to(dtype) if v.is_floating_point() else v)[:rows] for k, v in self.batch().items()}


TINY = {"num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "length": 6}
CASES = {
    "mlp": Case(
        AutoModelForImageClassification,
        MLPForImageClassification,
        MLPConfig(image_size=8, num_channels=2, hidden_sizes=(12, 9), num_labels=3),
        images,
        class_loss,
        (ROWS, 3),
    ),
    "mlp_leaky": Case(
        AutoModelForImageClassification,
        MLPForImageClassification,
        MLPConfig(image_size=8, num_channels=2, hidden_sizes=(12, 9), hidden_act="leaky_relu", num_labels=3),
        images,
        class_loss,
        (ROWS, 3),
    ),
    "cnn": Case(
        AutoModelForImageClassification,
        CNNForImageClassification,
        CNNConfig(image_size=8, channels=(2, 4, 6), num_labels=3),
        images,
        class_loss,
        (ROWS, 3),
    ),
    "residual_cnn": Case(
        AutoModelForImageClassification,
        ResidualCNNForImageClassification,
        ResidualCNNConfig(image_size=8, channels=(2, 6, 6, 6, 8, 8, 8), num_labels=3),
        images,
        class_loss,
        (ROWS, 3),
    ),
    "sequence_classifier": Case(
        AutoModelForSequenceClassification,
        TransformerForSequenceClassification,
        SequenceClassifierConfig(**TINY, num_labels=3),
        pixels,
        class_loss,
        (ROWS, 3),
    ),
    "sequence_regressor": Case(
        AutoModelForTimeSeriesPrediction,
        TransformerForSequenceRegression,
        SequenceRegressorConfig(input_size=2, **TINY),
        series,
        lambda logits, labels: (logits - labels).square().mean(),
        (ROWS, 6, 2),
    ),
    "causal_lm": Case(
        AutoModelForCausalLM,
        TransformerForCausalLM,
        CausalLMConfig(vocab_size=VOCAB, **TINY),
        tokens,
        next_token_loss,
        (ROWS, 6, VOCAB),
    ),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_sequence_model = pytest.mark.parametrize("name", ["sequence_classifier", "sequence_regressor", "causal_lm"])
each_causal = pytest.mark.parametrize("name", ["sequence_regressor", "causal_lm"])


@each
def test_loss_logits_and_round_trip(case, tmp_path):
    model, batch = case.build().eval(), case.data()
    outputs = model(**batch)
    assert outputs.logits.shape == case.shape
    torch.testing.assert_close(outputs.loss, case.loss(outputs.logits, batch["labels"]))
    labels = batch.pop("labels")
    assert model(**batch).loss is None
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is case.model
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    torch.testing.assert_close(loaded(**batch, labels=labels).logits, outputs.logits, rtol=0, atol=0)


@each
def test_every_parameter_gets_a_gradient(case):
    model = case.build(torch.float64)
    model(**case.data(torch.float64)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias of the keys adds the same to all scores of a query, which softmax does not see.
        assert name.endswith("k_proj.bias") or parameter.grad.any(), name


@each
def test_teleports(case):
    model, batch = case.build(torch.float64), case.data(torch.float64, rows=2)
    report = Teleporter(model, TeleportConfig(steps_per_batch=60, max_growth=1.5)).teleport([batch], lambda m, b: m(**b).loss)
    assert report.grad_norm_after >= 1.5 * report.grad_norm_before
    # The language model's loss is Transformers', which is computed in float32.
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6 if case.auto is AutoModelForCausalLM else 1e-10)


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "sequence_regressor", "causal_lm"])
def test_trainer_averages_accumulated_batches(name, tmp_path):
    case = CASES[name]
    columns = case.data()
    rows = [{key: column[i] for key, column in columns.items()} for i in range(ROWS)]
    weights = []
    for batch_size, accumulation in ((ROWS, 1), (2, ROWS // 2)):
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
        model = case.build()
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", ["residual_cnn", "sequence_classifier"])
def test_another_number_of_classes_keeps_the_rest_of_the_weights(name, tmp_path):
    case = CASES[name]
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    for key, parameter in loaded.named_parameters():
        if key.startswith(("classifier", "head")):
            assert parameter.shape[0] == 5
            assert parameter.isfinite().all()
            assert parameter.any()
        else:
            assert torch.equal(parameter, model.get_parameter(key)), key


def weight_shapes(model, kind):
    return [tuple(module.weight.shape) for module in model.modules() if isinstance(module, kind)]


def test_shapes_of_the_papers_image_networks():
    mlp = MLPForImageClassification(MLPConfig(num_labels=10))
    assert weight_shapes(mlp, nn.Linear) == [(1024, 784), (1024, 1024), (10, 1024)]
    cnn = CNNForImageClassification(CNNConfig(num_labels=10))
    assert weight_shapes(cnn, nn.Conv2d) == [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3)]
    assert cnn(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)
    residual = ResidualCNNForImageClassification(ResidualCNNConfig(num_labels=10))
    widths = [3, 64, 64, 64, 128, 128, 128, 256, 256, 256]
    assert weight_shapes(residual, nn.Conv2d) == [(o, i, 3, 3) for i, o in pairwise(widths)]
    assert weight_shapes(residual, nn.Linear) == [(10, 256 * 4 * 4)]
    assert [stage(torch.randn(1, i, 8, 8)).shape[1:] for i, stage in zip((3, 64, 128), residual.layers, strict=False)] == [
        (64, 4, 4),
        (128, 4, 4),
        (256, 4, 4),
    ]
    assert residual.num_parameters() == sum(9 * i * o + o for i, o in pairwise(widths)) + 10 * 4096 + 10


@pytest.mark.parametrize(("size", "channels"), [(28, (1, 4, 4, 4, 6, 6, 6, 8, 8, 8)), (7, (3, 5)), (9, (1, 4, 4, 6))])
def test_residual_network_takes_images_of_any_size(size, channels):
    model = ResidualCNNForImageClassification(ResidualCNNConfig(image_size=size, channels=channels, num_labels=3))
    assert model(torch.randn(2, channels[0], size, size)).logits.shape == (2, 3)


def test_skip_connections_carry_what_enters_a_stage():
    model = CASES["residual_cnn"].build()
    x = torch.randn(2, 2, 8, 8)
    expected = x
    for stage in model.layers[:-1]:
        expected = F.relu(F.conv2d(expected, stage.entry.weight, stage.entry.bias, stride=2, padding=1))
        first, _, second = stage.branch
        branch = F.relu(F.conv2d(expected, first.weight, first.bias, padding=1))
        expected = F.relu(expected + F.conv2d(branch, second.weight, second.bias, padding=1))
    torch.testing.assert_close(model(x).logits, model.classifier(expected.flatten(1)))
    with torch.no_grad():
        for stage in model.layers[:-1]:
            for layer in stage.branch[::2]:
                layer.weight.zero_()
                layer.bias.zero_()
    entered = x
    for stage in model.layers[:-1]:
        entered = F.relu(stage.entry(entered))
    torch.testing.assert_close(model.layers(x), entered.flatten(1))


def test_activation_of_the_mlp_and_its_weights():
    torch.manual_seed(0)
    relu = MLPForImageClassification(MLPConfig(image_size=4, hidden_sizes=(6, 5), num_labels=3))
    torch.manual_seed(0)
    leaky = MLPForImageClassification(MLPConfig(image_size=4, hidden_sizes=(6, 5), num_labels=3, hidden_act="leaky_relu"))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    # As `post_init` does it, in the order of the modules.
    for module in plain:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    x = torch.randn(7, 1, 4, 4)
    assert torch.equal(relu(x).logits, plain(x))
    for a, b in zip(relu.parameters(), leaky.parameters(), strict=True):
        assert torch.equal(a, b)
    plain[2], plain[4] = nn.LeakyReLU(), nn.LeakyReLU()
    assert torch.equal(leaky(x).logits, plain(x))


def parameters_of_the_body(width, layers, length):
    block = 4 * (width * width + width) + 2 * (4 * width * width) + 5 * width + 2 * 2 * width
    return layers * block + length * width + 2 * width


def test_sizes_of_the_papers_transformers():
    classifier = TransformerForSequenceClassification(SequenceClassifierConfig(num_labels=10))
    assert (classifier.config.hidden_size, classifier.layers[0].heads, len(classifier.layers)) == (128, 2, 2)
    assert classifier.num_parameters() == parameters_of_the_body(128, 2, 784) + 2 * 128 + 10 * 129
    assert classifier(torch.randn(1, 784, 1)).logits.shape == (1, 10)
    regressor = TransformerForSequenceRegression(SequenceRegressorConfig(input_size=321, length=168))
    assert (regressor.config.hidden_size, regressor.layers[0].heads, len(regressor.layers)) == (256, 4, 4)
    assert regressor.num_parameters() == parameters_of_the_body(256, 4, 168) + 322 * 256 + 321 * 257
    model = TransformerForCausalLM(CausalLMConfig(vocab_size=10_000, length=128))
    assert (model.config.hidden_size, model.layers[0].heads, len(model.layers)) == (256, 4, 4)
    assert model.num_parameters() == parameters_of_the_body(256, 4, 128) + 10_000 * 256 + 10_000 * 257
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("causal", [False, True])
def test_block_is_plain_attention_and_mlp(causal):
    block = TransformerBlock(12, heads=3, intermediate_size=20, causal=causal).double()
    stream = torch.randn(2, 5, 12, dtype=torch.float64)
    x = F.layer_norm(stream, (12,), block.attention_norm.weight, block.attention_norm.bias)
    mixed = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (projection(x)[..., part] for projection in (block.q_proj, block.k_proj, block.v_proj))
        scores = q @ k.mT / 2
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v)
    expected = stream + block.o_proj(torch.cat(mixed, -1))
    expected = expected + block.down_proj(F.gelu(block.up_proj(block.mlp_norm(expected))))
    torch.testing.assert_close(block(stream), expected)


def main_input(model, batch):
    return batch[model.main_input_name]


@each_causal
@pytest.mark.parametrize("changed", range(1, 6))
def test_the_future_does_not_reach_the_past(name, changed):
    case = CASES[name]
    model = case.build(torch.float64).eval()
    before = main_input(model, case.data(torch.float64))
    after = before.clone()
    after[:, changed:] = (after[:, changed:] + 1) % VOCAB
    a, b = model(before).logits, model(after).logits
    torch.testing.assert_close(a[:, :changed], b[:, :changed])
    assert not torch.isclose(a[:, changed:], b[:, changed:]).all(-1).any()


def test_classifier_sees_all_positions_and_their_order():
    case = CASES["sequence_classifier"]
    model = case.build().eval()
    inputs = case.data()["inputs"]
    logits = model(inputs).logits
    torch.testing.assert_close(logits, model.head(model.features(inputs).mean(1)))
    for place in range(6):
        changed = inputs.clone()
        changed[:, place] += 1
        assert not torch.isclose(model(changed).logits, logits).all(-1).any()
    assert not torch.allclose(model(inputs.flip(1)).logits, logits)


@each_sequence_model
def test_sequences_may_be_shorter_but_not_longer(name):
    case = CASES[name]
    model = case.build().eval()
    inputs = main_input(model, case.data())
    short = model(inputs[:, :4]).logits
    if name != "sequence_classifier":
        torch.testing.assert_close(short, model(inputs).logits[:, :4])
    with pytest.raises(ValueError, match="a sequence of 12 positions is not allowed; allowed: at most length = 6"):
        model(torch.cat([inputs, inputs], 1))


def test_language_model_divides_by_the_items_that_it_is_told():
    model, batch = CASES["causal_lm"].build(), CASES["causal_lm"].data()
    mean = model(**batch).loss
    count = int((batch["labels"][:, 1:] != -100).sum())
    for items in (10, torch.tensor(10)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, mean * count / 10)


def test_language_model_takes_a_mask_of_ones_and_no_other():
    model, batch = CASES["causal_lm"].build(), CASES["causal_lm"].data()
    mask = torch.ones_like(batch["input_ids"])
    assert torch.equal(model(**batch, attention_mask=mask).loss, model(**batch).loss)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask = a mask with zeros is not allowed; allowed: ones"):
        model(**batch, attention_mask=mask)


def test_language_model_can_get_more_tokens():
    model = CASES["causal_lm"].build()
    model.resize_token_embeddings(VOCAB + 3)
    outputs = model(input_ids=torch.tensor([[VOCAB + 2, 0]]), labels=torch.tensor([[0, VOCAB + 1]]))
    assert outputs.logits.shape == (1, 2, VOCAB + 3)
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("name", ["sequence_regressor", "causal_lm"])
def test_learns_what_repeats(name):
    case = CASES[name]
    model = case.build()
    torch.manual_seed(0)
    if name == "causal_lm":
        ids = (torch.arange(6) + torch.randint(VOCAB, (64, 1))) % VOCAB
        batch = {"input_ids": ids, "labels": ids}
    else:
        times = torch.arange(8) + 6 * torch.rand(64, 1)
        waves = torch.stack([times.sin(), times.cos()], -1)
        batch = {"inputs": waves[:, :6], "labels": waves[:, 2:]}
    before = model(**batch).loss
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * before


@pytest.mark.skipif(not (SHARED / "electricity").exists(), reason="the shared copy of the electricity data is not here")
def test_regressor_teleports_on_real_loads():
    _, _, rows = load_series(str(SHARED / "electricity"), context=48, horizon=48, shift=24, columns=["c000", "c001", "c320"])
    batch = {key: torch.stack([rows[i][key] for i in (0, 40)]) for key in ("inputs", "labels")}
    # The target lies inside the input, which is why attention has to be causal.
    assert torch.equal(batch["labels"][:, :24], batch["inputs"][:, 24:])
    torch.manual_seed(0)
    config = SequenceRegressorConfig(input_size=3, length=48, num_attention_heads=2, num_hidden_layers=2)
    model = TransformerForSequenceRegression(config)
    report = Teleporter(model, TeleportConfig(steps_per_batch=20, max_growth=1.5)).teleport([batch], lambda m, b: m(**b).loss)
    assert report.grad_norm_after >= 1.5 * report.grad_norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)


def test_values_that_are_not_allowed():
    with pytest.raises(ValueError, match=r"hidden_act = 'relux' is not allowed; allowed: one of .*leaky_relu"):
        MLPConfig(hidden_act="relux")
    with pytest.raises(ValueError, match=r"channels = \[3\] is not allowed; allowed: the image's channels, then one number"):
        ResidualCNNConfig(channels=(3,))
    with pytest.raises(ValueError, match="num_attention_heads = 3 is not allowed; allowed: a divisor of hidden_size = 8"):
        SeriesConfig(hidden_size=8, num_attention_heads=3)


def tiny_forecaster():
    return SeriesTransformer(
        SeriesConfig(
            channels=2, context=6, horizon=3, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )


def test_forecaster_learns_from_the_past_and_round_trips(tmp_path):
    model = tiny_forecaster().eval()
    inputs, labels = torch.randn(5, 6, 2), torch.randn(5, 3, 2)
    outputs = model(inputs=inputs, labels=labels)
    assert outputs.logits.shape == (5, 3, 2)
    torch.testing.assert_close(outputs.loss, (outputs.logits - labels).square().mean())
    assert model(inputs=inputs).loss is None
    # Every time step is attended to, and its place in the window counts.
    for changed in (inputs.index_fill(1, torch.tensor([0]), 1.0), inputs.flip(1)):
        assert not torch.allclose(model(inputs=changed).logits, outputs.logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(inputs=inputs).logits, outputs.logits)
    loaded.train()
    optimizer = torch.optim.Adam(loaded.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loaded(inputs=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * outputs.loss


def test_forecaster_is_what_checkpoints_and_results_were_made_with():
    """Names, initial weights and forecasts as they were when its block was its own."""
    model = tiny_forecaster()
    layers = ["attention_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "up_proj", "down_proj"]
    modules = ["embed", *(f"layers.{i}.{layer}" for i in range(2) for layer in layers), "norm", "head"]
    assert list(model.state_dict()) == ["positions", *(f"{module}.{part}" for module in modules for part in ("weight", "bias"))]
    total = sum(float(value.double().abs().sum()) for value in model.state_dict().values())
    assert total == pytest.approx(243.3984, abs=1e-4)
    outputs = model(inputs=torch.randn(5, 6, 2), labels=torch.randn(5, 3, 2))
    expected = torch.tensor([[-0.2124, -0.1323], [1.1991, -0.3799], [-0.4030, 0.1842]])
    torch.testing.assert_close(outputs.logits[0], expected, rtol=0, atol=1e-4)
    assert outputs.loss.item() == pytest.approx(1.3092, abs=1e-4)
