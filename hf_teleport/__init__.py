"""Teleportation for the Hugging Face Trainer: move the weights where the loss stays and the optimizer learns faster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_teleport.version import __version__

if TYPE_CHECKING:
    from hf_teleport.arguments import TeleportArguments, TeleportTrainingArguments
    from hf_teleport.config import TeleportConfig
    from hf_teleport.report import LayerReport, TeleportReport
    from hf_teleport.teleporter import Teleporter
    from hf_teleport.trainer import TeleportMixin, TeleportTrainer

# The module of each public name. A name is imported on first use, because torch and Transformers take seconds to import and
# `hf-teleport --help` needs neither.
_HOME = {
    "LayerReport": "report",
    "TeleportArguments": "arguments",
    "TeleportConfig": "config",
    "TeleportMixin": "trainer",
    "TeleportReport": "report",
    "TeleportTrainer": "trainer",
    "TeleportTrainingArguments": "arguments",
    "Teleporter": "teleporter",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; known are {', '.join(__all__)}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
