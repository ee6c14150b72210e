"""Ways to move inside a level set, behind one interface."""

from hf_teleport.methods.base import Method, Move
from hf_teleport.methods.basis import BasisTurn
from hf_teleport.methods.level_set import LevelSet
from hf_teleport.methods.null_space import NullSpace
from hf_teleport.methods.symmetry import GroupAction

METHODS: dict[str, type[Method]] = {"null_space": NullSpace, "basis": BasisTurn, "level_set": LevelSet, "symmetry": GroupAction}

__all__ = ["METHODS", "BasisTurn", "GroupAction", "LevelSet", "Method", "Move", "NullSpace"]
