"""Ways to move inside a level set, behind one interface."""

from hf_teleport.methods.base import Method, Move
from hf_teleport.methods.null_space import NullSpace

METHODS: dict[str, type[Method]] = {"null_space": NullSpace}

__all__ = ["METHODS", "Method", "Move", "NullSpace"]
