"""Libraries that only the experiments and the reports need, imported when they are needed."""

from importlib import import_module
from typing import Any


def require_extra(module: str) -> Any:
    """Import a module that is an optional library, or needs one.

    Raises:
        ModuleNotFoundError: the library is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {error.name}, which is not installed: pip install 'hf_teleport[experiments]'"
        ) from error
