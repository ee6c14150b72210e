"""The teleport settings as training arguments, for `HfArgumentParser`, YAML files and the command line."""

import re
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from transformers import TrainingArguments

from hf_teleport.config import TeleportConfig

PREFIX = "teleport_"

# Types for the command line. The fields of TeleportConfig have unions here, which argparse can't parse.
_PARSED_AS: dict[str, Any] = {
    "epochs": str,
    "steps": str | None,
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
}


def _prefixed(setting: Any) -> tuple[str, Any, Any]:
    # In argparse's help a percent sign starts a format.
    metadata = {"help": setting.metadata["help"].replace("%", "%%")}
    default = str(setting.default) if setting.name == "epochs" else setting.default
    own: Any = field(default=default, default_factory=setting.default_factory, metadata=metadata)
    return f"{PREFIX}{setting.name}", _PARSED_AS.get(setting.name, setting.type), own


_Settings = make_dataclass("_Settings", [_prefixed(setting) for setting in fields(TeleportConfig)])


@dataclass
class TeleportArguments(_Settings):  # type: ignore[misc, valid-type]
    """Every field of `TeleportConfig` with the prefix `teleport_`: mix it into any arguments class.

    `@dataclass class MyConfig(TeleportArguments, SFTConfig): ...` makes a TRL configuration with teleport settings.
    """

    def teleport_config(self) -> TeleportConfig:
        """The settings as a validated `TeleportConfig`.

        Raises:
            ValueError: a value that is not allowed.
        """
        settings = {f.name: getattr(self, PREFIX + f.name) for f in fields(TeleportConfig)}
        # argparse always gives a list here, even for a single regular expression or 'all-linear'.
        for name in ("target_modules", "exclude_modules"):
            value = settings[name]
            if isinstance(value, list) and len(value) == 1 and not re.fullmatch(r"(?!all-linear$)[\w.-]+", value[0]):
                settings[name] = value[0]
        # In a hyperparameter search, Trainer turns a string into a list of its letters.
        symmetries = settings["symmetries"]
        if isinstance(symmetries, list) and symmetries and all(len(word) == 1 for word in symmetries):
            settings["symmetries"] = "".join(symmetries)
        try:
            return TeleportConfig(**settings)
        except ValueError as error:
            # The message begins with the setting's name. Without the prefix, `learning_rate` would seem to be the training's.
            raise ValueError(f"{PREFIX}{error}") from None


@dataclass
class TeleportTrainingArguments(TeleportArguments, TrainingArguments):
    """`TrainingArguments` with the teleport settings: `--teleport_epochs 5 --teleport_num_batches 32`.

    Raises:
        ValueError: a teleport setting is not allowed. It is raised when the arguments are made.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teleport_config()
