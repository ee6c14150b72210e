"""Find a trainer's settings: in the `TeleportConfig` that it was given, or in its training arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_teleport.arguments import PREFIX, TeleportArguments
from hf_teleport.config import TeleportConfig


class Settings:
    """The settings of a trainer: those that were given, or else the current values of its training arguments.

    Args:
        arguments: returns the training arguments, which may be replaced later.
        given: the settings that were given. None: use the training arguments.

    Raises:
        ValueError: `given` and the arguments have settings that differ.
    """

    def __init__(self, arguments: Callable[[], Any], given: TeleportConfig | None):
        self._arguments = arguments
        argued = self._argued()
        if given is not None and argued not in (TeleportConfig(), given):
            raise ValueError(
                f"teleport settings are given twice, as {given.as_python()} and in the training "
                f"arguments, {argued.as_python()}: leave out one of them."
            )
        self.give(given)

    def give(self, config: TeleportConfig | None) -> None:
        """Use these settings from now on. None: use the training arguments."""
        self._seen = self._argued()
        self._given = config is not None
        self._config = replace(self._seen) if config is None else config

    def read(self) -> TeleportConfig:
        """The current settings.

        Raises:
            ValueError: settings were given, and afterwards the training arguments were changed too.
        """
        argued = self._argued()
        if argued != self._seen:
            if self._given:
                raise ValueError(
                    f"teleport settings are in two places: teleport_config is {self._config.as_python()}, and after it was "
                    f"given the training arguments were changed to {argued.as_python()}. Change teleport_config, or set "
                    "trainer.teleport_config = None to use the arguments."
                )
            self._config, self._seen = argued, replace(argued)
        return self._config

    @property
    def prefix(self) -> str:
        """The prefix of a setting's name for the user: 'teleport_' for training arguments, else none."""
        return PREFIX if not self._given and isinstance(self._arguments(), TeleportArguments) else ""

    def _argued(self) -> TeleportConfig:
        arguments = self._arguments()
        return arguments.teleport_config() if isinstance(arguments, TeleportArguments) else TeleportConfig()
