"""Ways to move inside a level set, in two families behind one interface: a file or a folder is what `method` names."""

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
