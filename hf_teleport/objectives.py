"""What a teleport climbs: a value of the loss gradient, and the direction along which the Hessian is taken."""

from collections.abc import Callable

from torch import Tensor

Gradients = list[Tensor | None]


def grad_norm(gradients: Gradients) -> Gradients:
    """`L_teleport = ½ ||g||²`, the paper's objective: its gradient is `H u` with u = g."""
    return [None if g is None else g.detach() for g in gradients]


OBJECTIVES: dict[str, Callable[[Gradients], Gradients]] = {"grad_norm": grad_norm}
"""For each objective, the direction u whose Hessian-vector product `H u` is the objective's gradient."""
