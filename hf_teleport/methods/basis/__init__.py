"""Method `basis`: find a model's exact symmetries, choose a basis, turn weights and optimizer state."""

from hf_teleport.methods.basis.method import BasisTurn
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.symmetry import Symmetry

__all__ = ["BasisTurn", "Symmetry", "find_symmetries"]
