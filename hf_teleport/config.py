"""`TeleportConfig`: all settings of teleportation, with the paper's symbols in the help.

It is the single definition. `TeleportTrainingArguments` takes its fields from here, so the command line, a YAML file and plain
Python have the same settings.
"""

import difflib
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from inspect import cleandoc
from typing import Any

from hf_teleport.settings.groups import (
    SYMMETRIES,
    AutoSettings,
    BasisSettings,
    ClimbSettings,
    CommonSettings,
    NullSpaceSettings,
    ScopeSettings,
    readers,
    reads,
)
from hf_teleport.settings.values import parse_epochs, parse_steps, read, require

__all__ = ["SYMMETRIES", "TeleportConfig", "parse_epochs", "parse_steps"]


# A dataclass puts the fields of its last base first.
@dataclass
class TeleportConfig(AutoSettings, BasisSettings, NullSpaceSettings, ScopeSettings, ClimbSettings, CommonSettings):
    """Settings of teleportation (arXiv 2502.11362, Algorithm 1).

    Raises:
        ValueError: a value is not allowed, or a setting was changed that `method` does not read. The message names the field,
            the value and the allowed values.
    """

    def __post_init__(self) -> None:
        for setting in fields(self):
            setattr(self, setting.name, read(setting, getattr(self, setting.name)))
        tau, joint = self.energy_threshold, self.scope == "joint" and self.step_size == "relative"
        allowed = "above 0, at most 1" + (", or None" if joint else " (None: with scope 'joint' and step_size 'relative')")
        require(joint if tau is None else 0 < tau <= 1, "energy_threshold", tau, allowed)
        alone = self.method == "null_space" and self.scope == "joint"
        require(self.control is None or alone, "control", self.control, "None, but with method 'null_space' and scope 'joint'")
        for name in self._changed():
            if not reads(self.method, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is not read by method {self.method!r}; methods that read it: "
                    f"{', '.join(readers(name))}. Leave it out, or choose one of these."
                )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TeleportConfig":
        """Build from a mapping, for instance one read from YAML.

        Raises:
            ValueError: a key is unknown (the message gives the nearest known one), or a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key.removeprefix("teleport_"), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown teleport setting {key!r}; {hint}Known: {', '.join(known)}.")
        return cls(**settings)

    def for_method(self, method: str) -> "TeleportConfig":
        """The same settings for another method. Settings that it does not read go back to their defaults.

        Raises:
            ValueError: there is no such method.
        """
        unread = {setting.name: _default(setting) for setting in fields(self) if not reads(method, setting.name)}
        return replace(self, **unread, method=method)  # type: ignore[arg-type]

    def each_method(self) -> list["TeleportConfig"]:
        """The same settings once for each method of an event, in order."""
        return [self.for_method(name) for name in self.method.split("+")]

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain Python values."""
        return asdict(self)

    def as_python(self) -> str:
        """The Python call that makes these settings. Defaults are left out."""
        return f"TeleportConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in self._changed())})"

    def allows(self, loss: float, reference: float) -> bool:
        """Whether a loss differs from a reference by at most `max_loss_change`."""
        limit = self.max_loss_change
        return limit is None or abs(loss - reference) <= limit * abs(reference)

    def _changed(self) -> list[str]:
        """The settings that are not at their defaults."""
        return [setting.name for setting in fields(self) if getattr(self, setting.name) != _default(setting)]


# help() and the reference show the help texts of the settings, so each text exists once.
TeleportConfig.__doc__ = f"{cleandoc(TeleportConfig.__doc__ or '')}\n\nAttributes:\n" + "\n".join(
    f"    {setting.name}: {setting.metadata['help']}" for setting in fields(TeleportConfig)
)


def _default(setting: "Field[Any]") -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
