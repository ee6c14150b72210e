"""Layer families: how an operation sees its input as rows and its weight as a matrix. Importing this fills their registry."""

from importlib import import_module
from pkgutil import iter_modules

from hf_teleport.projectors.base import Call, Projector, projectors_for, register

__all__ = ["Call", "Projector", "projectors_for", "register"]

# A family registers itself, so a new file in this folder need not be named here.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
