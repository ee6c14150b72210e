"""What an optimizer remembers of a weight's gradients: forgotten, or turned when the weight gets another basis.

Averages of gradients turn exactly as the weights do. Averages of squared gradients do not: `v <- (Q∘Q) v` is what they would be
if the gradient's coordinates were uncorrelated, and keeps their sum.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

# By the names under which optimizers of torch and Transformers keep them.
FIRST = {"exp_avg", "momentum_buffer", "exp_avg_diff"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "variance", "row_var", "col_var"}
# Those of Transformers' Adafactor lack the axis that they are a mean over.
FACTORED = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}


class OptimizerState:
    """The state of an optimizer of torch, turned along with the weights.

    Args:
        optimizer: also one wrapped by Accelerate.
    """

    def __init__(self, optimizer: Any):
        self.optimizer: Optimizer = unwrapped(optimizer)

    @property
    def _state(self) -> dict[Any, Any]:
        return self.optimizer.state

    def turn(
        self,
        part: Any,
        matrices: Tensor,
        turn_axis: Callable[[Tensor, Any, Tensor], Tensor],
        squares: Callable[[Tensor, Any], None] | None = None,
    ) -> None:
        """Turn what is remembered of a part's parameter; `turn_axis(tensor, part, matrices)` works in place.

        Args:
            squares: `squares(tensor, part)` is done with averages of squares; default: they turn by the squared matrices.
        """
        for tensor, dim, is_square in self._tensors(part.parameter, part.dim):
            at = _At(dim, part.positions)
            if is_square and squares is not None:
                squares(tensor, at)
            else:
                turn_axis(tensor, at, matrices.square() if is_square else matrices)

    def scale(self, parameter: nn.Parameter, dim: int, factors: Tensor) -> None:
        """The parameter's gradients are multiplied by factors along an axis."""
        for tensor, own, is_square in self._tensors(parameter, dim):
            shape = [1] * tensor.dim()
            shape[own] = -1
            tensor.mul_((factors.square() if is_square else factors).reshape(shape).to(tensor))

    def level(self, parameter: nn.Parameter) -> None:
        """A norm's gain has a new gradient in a new basis, unknown before: no momentum, and the mean of the squares."""
        for tensor, _, is_square in self._tensors(parameter, 0):
            tensor.fill_(float(tensor.mean()) if is_square else 0.0)

    def put_shares(self, parameter: nn.Parameter, shares: dict[int, Tensor]) -> None:
        """Spread the averages of squares along turned axes as measured.

        What remains of `v` is its sum over those axes, which no rotation changes; the product of the measured shares takes the
        place of the rest, so that a coordinate with a small gradient is not held back for long by the mean that a turn leaves it.

        Args:
            shares: for each turned axis the share of each index in the squared gradients, summing to one.
        """
        for tensor, _, is_square in self._tensors(parameter, 0):
            if is_square and tensor.shape == parameter.shape:
                kept = tensor.sum(tuple(shares), keepdim=True)
                tensor.copy_(kept.expand_as(tensor))
                for dim, share in shares.items():
                    tensor.mul_(share.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]).to(tensor))

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """All tensors that are kept for a parameter."""
        return {name: value for name, value in self._state.get(parameter, {}).items() if isinstance(value, Tensor)}

    def _tensors(self, parameter: nn.Parameter, dim: int) -> list[tuple[Tensor, int, bool]]:
        """Tensor, the axis in it of the parameter's axis, and whether it holds squares."""
        found = []
        for name, tensor in self.tensors(parameter).items():
            if name in FACTORED:
                own = list(range(parameter.dim()))
                own.pop(FACTORED[name])
                if dim in own:
                    found.append((tensor, own.index(dim), True))
            elif tensor.dim() == parameter.dim() and tensor.shape[dim] == parameter.shape[dim] and name in FIRST | SECOND:
                found.append((tensor, dim, name in SECOND))
        return found


class _At:
    """A part's positions in a tensor that may lack some of the parameter's axes."""

    def __init__(self, dim: int, positions: Tensor):
        self.dim, self.positions = dim, positions


def forget(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Start anew what an optimizer remembers of these parameters, as if it had never seen them."""
    state = unwrapped(optimizer).state
    known = FIRST | SECOND | set(FACTORED)
    for parameter in parameters:
        kept = state.get(parameter, {})
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor) and value.numel() > 1}
        if set(tensors) <= known and all(tensor.is_floating_point() for tensor in tensors.values()):
            # In place, for an optimizer may make its state but once, when it is made itself.
            for name, value in kept.items():
                if isinstance(value, (Tensor, int, float)):
                    kept[name] = value.zero_() if isinstance(value, Tensor) else type(value)(0)
        else:
            del state[parameter]


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the one that Accelerate wraps around it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def keeps_copies(optimizer: Any) -> bool:
    """Whether an optimizer seems to keep copies of the weights, which do not follow a teleport: Lookahead, schedule-free ones."""
    optimizer = unwrapped(optimizer)
    return hasattr(optimizer, "optimizer") or callable(getattr(optimizer, "train", None))


def check_optimizer(optimizer: Any, *, reset: bool = False) -> None:
    """Make sure that a change of basis makes sense for an optimizer, and that its state can follow.

    Both are found out by some steps of a new one of its kind on a small matrix, as it is and turned.

    Raises:
        ValueError: an optimizer whose steps do not depend on the basis, or one with a state that is not known.
    """
    optimizer = unwrapped(optimizer)
    name = type(optimizer).__name__
    if keeps_copies(optimizer):
        raise ValueError(
            f"{name} seems to keep copies of the weights, which would stay in the old basis. Use an optimizer that keeps none, "
            "such as AdamW."
        )
    known = sorted(FIRST | SECOND | set(FACTORED))
    start_anew = "Set teleport_optimizer_state='reset' to start its state anew for the weights that turn."
    generator = torch.Generator().manual_seed(0)
    # RAdam begins as plain momentum, and looks at each coordinate from its sixth step on.
    turn, *gradients = (torch.randn(4, 4, generator=generator) for _ in range(9))
    turn = torch.linalg.qr(turn).Q
    try:
        moved, kept = _tried(optimizer, gradients)
        moved_turned, _ = _tried(optimizer, [turn @ gradient for gradient in gradients])
    except Exception as error:  # whatever an optimizer of another library needs
        if reset:
            return
        raise ValueError(f"the state of {name} is not known ({error}), so it cannot be turned. {start_anew}") from error
    # Muon computes in bfloat16; a step that sees the basis is another one altogether.
    if moved.any() and (turn @ moved - moved_turned).norm() < 0.05 * moved.norm():
        raise ValueError(
            f"a change of basis does nothing for {name}: its steps are the same in every basis. Use an optimizer that looks at "
            "each coordinate alone (AdamW, Adafactor, Adagrad, ...), or teleport_method='null_space'."
        )
    if (unknown := sorted(kept - set(known))) and not reset:
        raise ValueError(f"{name} keeps {', '.join(unknown)}, which cannot be turned; known are {', '.join(known)}. {start_anew}")


def _tried(optimizer: Optimizer, gradients: list[Tensor]) -> tuple[Tensor, set[str]]:
    """The last step of an optimizer of the same kind on a matrix that gets these gradients, and what it then keeps for it."""
    device = optimizer.param_groups[0]["params"][0].device
    matrix = nn.Parameter(torch.zeros(4, 4, device=device))
    taken = inspect.signature(type(optimizer)).parameters
    trial = type(optimizer)([matrix], **{name: value for name, value in optimizer.defaults.items() if name in taken})
    before = matrix.detach().clone()
    for gradient in gradients:
        before.copy_(matrix.detach())
        matrix.grad = gradient.clone().to(device)
        trial.step()
    kept = {
        name
        for name, value in trial.state[matrix].items()
        if (isinstance(value, Tensor) and value.numel() > 1) or (isinstance(value, (list, tuple, dict)) and value)
    }
    return (matrix.detach() - before).cpu(), kept
