"""Exact symmetries of a model: find them, choose a basis, turn weights and optimizer state."""

from hf_teleport.symmetry.spaces import Symmetry, find_symmetries

__all__ = ["Symmetry", "find_symmetries"]
