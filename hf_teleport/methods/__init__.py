"""The teleport methods: ways to move weights inside a level set. A file or folder for each value of `method`, one interface."""

from hf_teleport.methods.base import ClimbingMethod, Method, Move, TurningMethod
from hf_teleport.methods.basis import BasisTurn
from hf_teleport.methods.level_set import LevelSet
from hf_teleport.methods.null_space import NullSpace
from hf_teleport.methods.symmetry import GroupAction

METHODS: dict[str, type[ClimbingMethod] | type[TurningMethod]] = {
    "null_space": NullSpace,
    "basis": BasisTurn,
    "level_set": LevelSet,
    "symmetry": GroupAction,
}

__all__ = ["METHODS", "BasisTurn", "ClimbingMethod", "GroupAction", "LevelSet", "Method", "Move", "NullSpace", "TurningMethod"]
