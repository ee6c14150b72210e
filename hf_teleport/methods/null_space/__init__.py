"""Method `null_space`: climb inside the null space of every layer's inputs (arXiv 2502.11362)."""

from hf_teleport.methods.null_space.method import NullSpace

__all__ = ["NullSpace"]
