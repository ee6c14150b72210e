"""The exact product of the Hessian with a direction, by a backward through a backward."""

import torch
from torch import Tensor, nn

from hf_teleport.layers.double import keeping_double
from hf_teleport.layers.point import Point


def hessian_vector_product(
    point: Point, direction: list[Tensor | None], wanted: list[nn.Parameter] | None = None
) -> list[Tensor | None]:
    """`H u`. H is the Hessian of the loss on this process's share of the batch.

    Args:
        point: made with `differentiable_gradients=True`.
        direction: u: a tensor for each of the point's parameters, or None for zeros.
        wanted: the parameters whose part of `H u` is returned. Default: all of the point's parameters.

    Returns:
        A tensor for each parameter in `wanted`, or None for zeros.

    Raises:
        ValueError: an operation of the model cannot be differentiated twice.
    """
    pairs = [
        (_real(g), _real(u.detach()))
        for g, u in zip(point.own_gradients, direction, strict=True)
        if g is not None and u is not None and g.requires_grad
    ]
    wanted = point.parameters if wanted is None else wanted
    if not pairs or not wanted:  # no gradient depends on the weights, so H u is zero
        return [None] * len(wanted)
    inner = sum(((g * u).sum() for g, u in pairs), start=torch.zeros((), device=pairs[0][0].device))
    try:
        with keeping_double(point.parameters):
            return list(torch.autograd.grad(inner, wanted, allow_unused=True, retain_graph=True))
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"exact second derivatives need operations that can be differentiated twice ({error}); load the model with plain "
            "ones (attn_implementation='eager'), or use method='null_space' with hessian='fast'."
        ) from error


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
