"""The paper's small networks and a forecaster as Transformers models, so that Trainer, save, push and `from_pretrained` work."""

from transformers import AutoConfig, AutoModelForImageClassification

from hf_teleport.models.cnn import CNNConfig, CNNForImageClassification
from hf_teleport.models.mlp import MLPConfig, MLPForImageClassification
from hf_teleport.models.series import SeriesConfig, SeriesTransformer

AutoConfig.register(MLPConfig.model_type, MLPConfig)
AutoConfig.register(CNNConfig.model_type, CNNConfig)
AutoConfig.register(SeriesConfig.model_type, SeriesConfig)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification)
AutoModelForImageClassification.register(CNNConfig, CNNForImageClassification)

__all__ = [
    "CNNConfig",
    "CNNForImageClassification",
    "MLPConfig",
    "MLPForImageClassification",
    "SeriesConfig",
    "SeriesTransformer",
]
