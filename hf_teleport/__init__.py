"""Teleportation for Transformers: move a model's weights where the loss stays and the gradient grows, then train on."""

from hf_teleport.arguments import TeleportArguments, TeleportTrainingArguments
from hf_teleport.config import TeleportConfig
from hf_teleport.report import LayerReport, TeleportReport
from hf_teleport.teleporter import Teleporter
from hf_teleport.trainer import TeleportMixin, TeleportTrainer
from hf_teleport.version import __version__

__all__ = [
    "LayerReport",
    "TeleportArguments",
    "TeleportConfig",
    "TeleportMixin",
    "TeleportReport",
    "TeleportTrainer",
    "TeleportTrainingArguments",
    "Teleporter",
    "__version__",
]
