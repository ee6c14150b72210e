"""Layer families: how an operation sees its input as rows and its weight as a matrix."""

from hf_teleport.projectors import bilinear, conv, linear, products  # noqa: F401  (importing them fills the registry)
from hf_teleport.projectors.base import Call, Projector, projectors_for, register

__all__ = ["Call", "Projector", "projectors_for", "register"]
