"""Method `symmetry`: climb over groups that act on adjacent layers of a perceptron (arXiv 2205.10637)."""

from hf_teleport.methods.symmetry.method import GroupAction

__all__ = ["GroupAction"]
