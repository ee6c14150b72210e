import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_teleport import metrics
from hf_teleport.lab.data import TensorRows


def test_the_metrics_are_those_of_numpy():
    rng = np.random.default_rng(0)
    classes, references = rng.integers(5, size=(2, 300))
    numbers, targets = rng.normal(size=(2, 300))
    assert metrics.Accuracy().compute(predictions=classes, references=references) == {"accuracy": np.mean(classes == references)}
    error = metrics.MeanSquaredError().compute(predictions=numbers, references=targets)["mse"]
    assert error == pytest.approx(np.mean((numbers - targets) ** 2), rel=1e-12)
    assert metrics.Perplexity().compute(predictions=np.full(7, np.log(3.0))) == {"perplexity": pytest.approx(3.0)}


def test_metrics_take_what_comes_in_batches():
    metric = metrics.Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[2], references=[2])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


class Net(nn.Module):
    """Gives out what it is given; like Transformers' models it may add outputs after the logits."""

    def __init__(self, more=False):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.more = more

    def forward(self, logits, labels):
        loss = (logits.sum() + self.unused).mean() * 0
        return {"loss": loss, "logits": logits} | ({"states": logits * 2} if self.more else {})


def evaluated(tmp_path, measure, logits, labels, more=False):
    """What a Trainer reports, from three rows at a time."""
    training = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = TensorRows(logits=logits, labels=labels)
    return Trainer(Net(more), training, eval_dataset=rows, **metrics.trainer_arguments(measure)).evaluate()


@pytest.mark.parametrize("more", [False, True])
def test_accuracy_in_a_trainer(tmp_path, more):
    logits, labels = torch.randn(10, 4), torch.randint(4, (10,))
    expected = float((logits.argmax(-1) == labels).float().mean())
    assert evaluated(tmp_path, "accuracy", logits, labels, more)["eval_accuracy"] == pytest.approx(expected)
    # Without the function that makes classes of logits, too.
    assert metrics.accuracy(EvalPrediction(logits.numpy(), labels.numpy())) == {"accuracy": pytest.approx(expected)}


@pytest.mark.parametrize("more", [False, True])
def test_mean_squared_error_in_a_trainer(tmp_path, more):
    forecast, labels = torch.randn(10, 7, 3), torch.randn(10, 7, 3)
    expected = np.square(forecast.double().numpy() - labels.double().numpy()).mean()
    assert evaluated(tmp_path, "mean_squared_error", forecast, labels, more)["eval_mse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("more", [False, True])
def test_perplexity_in_a_trainer(tmp_path, more):
    logits, tokens = torch.randn(10, 6, 11), torch.randint(11, (10, 6))
    labels = tokens.clone()
    labels[4, 2:] = -100
    # Each token after the first by the logits of the place before it, of those that count.
    log_likelihoods = [
        float(torch.log_softmax(logits[row, place - 1].double(), -1)[tokens[row, place]])
        for row in range(10)
        for place in range(1, 6)
        if labels[row, place] >= 0
    ]
    assert len(log_likelihoods) == 46
    expected = np.exp(-np.mean(log_likelihoods))
    assert evaluated(tmp_path, "perplexity", logits, labels, more)["eval_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_transformers_loss():
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(5, 9, 13), torch.randint(13, (5, 9))
    losses = metrics.token_losses(logits, labels)
    assert losses.shape == (5, 8)
    expected = torch.exp(ForCausalLMLoss(logits, labels, 13))
    value = metrics.perplexity(SimpleNamespace(predictions=losses.numpy(), label_ids=labels.numpy()))["perplexity"]
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_an_unknown_measure_is_said():
    with pytest.raises(ValueError, match=r"measure = 'f1' is not allowed; allowed: one of \['accuracy'"):
        metrics.trainer_arguments("f1")


SCRIPT = """
import multiprocessing
import sys
import hf_teleport, hf_teleport.lab.data
assert "evaluate" not in sys.modules, "the package imports an extra"
import numpy as np
from hf_teleport.metrics import Accuracy

def measure(share):
    right = np.arange(100) < share * 100
    return {Accuracy().compute(predictions=right, references=np.ones(100))["accuracy"] for _ in range(50)}

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(measure, [0.3, 0.8], chunksize=1))
"""


def test_two_processes_at_once_offline_and_only_if_asked_for(tmp_path):
    # A new home, so that nothing is cached and both processes begin with the same empty folder.
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[{0.3}, {0.8}]\n", done.stderr
