"""Where a trainer's settings stand: in one `TeleportConfig` that it was given, or in its training arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_teleport.arguments import PREFIX, TeleportArguments
from hf_teleport.config import TeleportConfig


class Settings:
    """The settings of a trainer, read anew each time: those given, else those of its training arguments as they are by then.

    Args:
        arguments: the training arguments, which may be others later.
        given: None: there are only the arguments.

    Raises:
        ValueError: `given` and the arguments have settings that differ.
    """

    def __init__(self, arguments: Callable[[], Any], given: TeleportConfig | None):
        self._arguments = arguments
        argued = self._argued()
        if given is not None and argued not in (TeleportConfig(), given):
            raise ValueError(
                f"teleport settings are given twice, as {given.as_python()} and in the training "
                f"arguments, {argued.as_python()}: leave one of them out."
            )
        self.give(given)

    def give(self, config: TeleportConfig | None) -> None:
        """From now on go by these, or with None by the training arguments."""
        self._seen = self._argued()
        self._given = config is not None
        self._config = replace(self._seen) if config is None else config

    def read(self) -> TeleportConfig:
        """The settings as they are now.

        Raises:
            ValueError: those of the training arguments were changed after others had been given.
        """
        argued = self._argued()
        if argued != self._seen:
            if self._given:
                raise ValueError(
                    f"teleport settings stand in two places: teleport_config is {self._config.as_python()}, and since it was "
                    f"given the training arguments were changed to {argued.as_python()}. Change teleport_config, or set "
                    "trainer.teleport_config = None to go by the arguments."
                )
            self._config, self._seen = argued, replace(argued)
        return self._config

    @property
    def prefix(self) -> str:
        """What the user writes before a setting's name."""
        return PREFIX if not self._given and isinstance(self._arguments(), TeleportArguments) else ""

    def _argued(self) -> TeleportConfig:
        arguments = self._arguments()
        return arguments.teleport_config() if isinstance(arguments, TeleportArguments) else TeleportConfig()
