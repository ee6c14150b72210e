"""The paper's metrics, made with `evaluate`: accuracy, mean squared error and perplexity, for your code and for a Trainer.

`evaluate.load` fetches a script from the Hub for each metric, and these need no network. They keep their inputs in memory, while
`evaluate` writes them to a file that processes share. The package itself does not import this module, because `evaluate` is an
extra.

    Trainer(model, training, compute_metrics=accuracy)
    Trainer(model, training, **trainer_arguments("perplexity"))
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Features, Value
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_teleport.reporting.extras import require_extra

evaluate: Any = require_extra("evaluate")

# The label that losses and metrics ignore, as everywhere in Transformers.
_IGNORED = -100


class _InMemory(evaluate.Metric):
    """A metric that takes one number for each example."""

    summary: str
    inputs: dict[str, str]

    def __init__(self, **settings: Any):
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> Any:
        features = Features({name: Value(dtype) for name, dtype in self.inputs.items()})
        return evaluate.MetricInfo(description=self.summary, citation="", inputs_description=self.summary, features=features)


class Accuracy(_InMemory):
    """Share of the examples whose predicted class (N,) equals the reference (N,)."""

    summary = "Share of right classes."
    inputs = {"predictions": "int64", "references": "int64"}  # noqa: RUF012 - a constant of the class

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.equal(predictions, references).mean())}


class MeanSquaredError(_InMemory):
    """Mean of the squared differences between predictions (N,) and references (N,)."""

    summary = "Mean of squared differences."
    inputs = {"predictions": "float64", "references": "float64"}  # noqa: RUF012

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"mse": float(np.square(np.subtract(predictions, references)).mean())}


class Perplexity(_InMemory):
    """Exponential of the mean loss per token. The losses (N,) are negative log-likelihoods in nats."""

    summary = "Exponential of the mean loss of a token."
    inputs = {"predictions": "float64"}  # noqa: RUF012

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.mean(predictions)))}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy from logits (N, classes), or from the classes (N,) that `classes` returns."""
    predicted = prediction.predictions
    predicted = predicted.argmax(-1) if predicted.ndim == 2 else predicted
    return Accuracy().compute(predictions=predicted, references=prediction.label_ids)


def mean_squared_error(prediction: EvalPrediction) -> dict[str, float]:
    """Mean squared error, from the distances (N,) that `distances` returns."""
    # Distances are root mean squares. The mean of their squares is the mean over all values, which are too many for `evaluate`.
    return MeanSquaredError().compute(predictions=prediction.predictions, references=np.zeros(len(prediction.predictions)))


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity, from the losses that `token_losses` or `masked_token_losses` returns. Labels of -100 are left out."""
    losses = np.asarray(prediction.predictions)
    # `token_losses` gives no loss for the first token.
    counted = np.asarray(prediction.label_ids)[:, -losses.shape[1] :] != _IGNORED
    return Perplexity().compute(predictions=losses[counted])


def classes(logits: Any, labels: Tensor) -> Tensor:
    """The most likely class (N,) by logits (N, classes). Logits may also be a tuple that begins with them."""
    return _first(logits).argmax(-1)


def distances(logits: Any, labels: Tensor) -> Tensor:
    """Root mean square (N,) of the difference between each forecast (N, ...) and its labels (N, ...)."""
    return (_first(logits).float() - labels.float()).square().flatten(1).mean(1).sqrt()


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Losses (N, length - 1) of a causal language model: logits (N, length, vocabulary) at each token predict the next.

    The logits of a whole test set would not fit into memory. Their losses do.
    """
    predicted = _first(logits)[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), reduction="none").view(len(labels), -1)


def masked_token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Losses (N, length) of a masked language model: logits (N, length, vocabulary) predict the token at their own position.

    A label of -100 gives a loss of 0.
    """
    return F.cross_entropy(_first(logits).float().mT, labels, reduction="none")


def _first(logits: Any) -> Tensor:
    return logits if isinstance(logits, torch.Tensor) else logits[0]


_ARGUMENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "accuracy": (accuracy, classes),
    "mean_squared_error": (mean_squared_error, distances),
    "perplexity": (perplexity, token_losses),
    "masked_perplexity": (perplexity, masked_token_losses),
}


def trainer_arguments(measure: str) -> dict[str, Callable[..., Any]]:
    """A Trainer's `compute_metrics` and `preprocess_logits_for_metrics` for a metric.

    Args:
        measure: 'accuracy', 'mean_squared_error', 'perplexity' or 'masked_perplexity'.

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in _ARGUMENTS:
        raise ValueError(f"measure = {measure!r} is not allowed; allowed: one of {list(_ARGUMENTS)}.")
    compute, preprocess = _ARGUMENTS[measure]
    return {"compute_metrics": compute, "preprocess_logits_for_metrics": preprocess}
