"""The training arguments of an experiment: Trainer's arguments, the teleport settings, and settings of the optimizer."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_teleport.arguments import TeleportTrainingArguments
from hf_teleport.lab.optimizers import MUON_ADAMW, accepted, optimizer_class

_ADAM = {f.name: f.default for f in fields(TrainingArguments) if f.name in ("adam_beta1", "adam_beta2", "adam_epsilon")}


@dataclass
class ExperimentArguments(TeleportTrainingArguments):
    """`TeleportTrainingArguments`, with an optimizer by name and learning rates for groups of parameters.

    Raises:
        ValueError: the optimizer is unknown or does not take its settings, or a learning rate is not positive.
    """

    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "In place of `optim`: a class of torch.optim or of pytorch_optimizer, such as SOAP, or 'muon+adamw': "
            "Muon for hidden matrices and AdamW for embeddings, output head, norms and biases."
        },
    )
    optimizer_settings: dict | str | None = field(
        default=None, metadata={"help": "Keyword settings of `optimizer`. With 'muon+adamw' they are settings of Muon."}
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of embeddings and output head. Default: `learning_rate`."}
    )
    parameter_learning_rates: dict | str | None = field(
        default=None,
        metadata={
            "help": "Learning rates by regular expression. The first expression that is found in a parameter's name counts."
        },
    )
    adam_beta1: float | None = field(default=None, metadata={"help": "Default: the optimizer's own, 0.9 for AdamW."})
    adam_beta2: float | None = field(default=None, metadata={"help": "Default: the optimizer's own, 0.999 for AdamW."})
    adam_epsilon: float | None = field(default=None, metadata={"help": "Default: the optimizer's own, 1e-8 for AdamW."})

    def __post_init__(self) -> None:
        if self.optimizer in (None, MUON_ADAMW):
            for name, default in _ADAM.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)
        super().__post_init__()
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        settings = _mapping("optimizer_settings", self.optimizer_settings)
        self.parameter_learning_rates = {
            pattern: _positive(f"parameter_learning_rates[{pattern!r}]", rate)
            for pattern, rate in _mapping("parameter_learning_rates", self.parameter_learning_rates).items()
        }
        if self.embedding_learning_rate is not None:
            _positive("embedding_learning_rate", self.embedding_learning_rate)
        if self.optimizer is None:
            if settings:
                raise ValueError(
                    f"optimizer_settings = {settings!r} is not allowed without `optimizer`; for `optim` give `optim_args`."
                )
            return
        known = accepted(optimizer_class(self.optimizer))
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"optimizer_settings has {unknown[0]!r}, which {self.optimizer!r} does not take; it takes {known}.")
        betas = [name for name in ("adam_beta1", "adam_beta2") if getattr(self, name) is not None]
        if betas and self.optimizer != MUON_ADAMW and "betas" not in known:
            raise ValueError(f"{betas[0]} is not allowed with optimizer = {self.optimizer!r}, which has no betas; leave it out.")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: a mapping.")
    return value or {}


def _positive(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: a positive number.")
    return number


def given(arguments: Any) -> bool:
    """Whether the settings need an optimizer that Trainer can't make by itself."""
    return bool(arguments.optimizer or arguments.embedding_learning_rate or arguments.parameter_learning_rates)
