"""What operations do to features: `RULES`, by name. Importing this package fills it."""

from hf_teleport.methods.basis.rules import attention, elements, layers, moves
from hf_teleport.methods.basis.rules.base import RULES, rule

__all__ = ["RULES", "attention", "elements", "layers", "moves", "rule"]
