"""The paper's networks and a forecaster as Transformers models, so that Trainer, save, push and `from_pretrained` work."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
)

from hf_teleport.lab.models.cnn import CNNConfig, CNNForImageClassification
from hf_teleport.lab.models.mlp import MLPConfig, MLPForImageClassification
from hf_teleport.lab.models.residual_cnn import ResidualCNNConfig, ResidualCNNForImageClassification
from hf_teleport.lab.models.series import SeriesConfig, SeriesTransformer
from hf_teleport.lab.models.transformer import (
    CausalLMConfig,
    SequenceClassifierConfig,
    SequenceRegressorConfig,
    TransformerForCausalLM,
    TransformerForSequenceClassification,
    TransformerForSequenceRegression,
)

for _auto, _config, _model in (
    (AutoModelForImageClassification, MLPConfig, MLPForImageClassification),
    (AutoModelForImageClassification, CNNConfig, CNNForImageClassification),
    (AutoModelForImageClassification, ResidualCNNConfig, ResidualCNNForImageClassification),
    (AutoModelForSequenceClassification, SequenceClassifierConfig, TransformerForSequenceClassification),
    (AutoModelForTimeSeriesPrediction, SequenceRegressorConfig, TransformerForSequenceRegression),
    (AutoModelForTimeSeriesPrediction, SeriesConfig, SeriesTransformer),
    (AutoModelForCausalLM, CausalLMConfig, TransformerForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)

__all__ = [
    "CNNConfig",
    "CNNForImageClassification",
    "CausalLMConfig",
    "MLPConfig",
    "MLPForImageClassification",
    "ResidualCNNConfig",
    "ResidualCNNForImageClassification",
    "SequenceClassifierConfig",
    "SequenceRegressorConfig",
    "SeriesConfig",
    "SeriesTransformer",
    "TransformerForCausalLM",
    "TransformerForSequenceClassification",
    "TransformerForSequenceRegression",
]
