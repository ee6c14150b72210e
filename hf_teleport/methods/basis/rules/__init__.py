"""What operations do to features: `RULES`, by name. Importing this package fills it."""

from importlib import import_module
from pkgutil import iter_modules

from hf_teleport.methods.basis.rules.base import RULES, rule

__all__ = ["RULES", "rule"]

# A rule registers itself, so a new file in this folder need not be named here.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
