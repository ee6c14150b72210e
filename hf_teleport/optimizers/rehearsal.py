"""What the optimizer would do next, found out on copies of its state: one step, how that bends, and several in a row.

Any optimizer that steps each parameter by its own gradient and state will do; nothing is assumed about its formula.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.optimizers.parts import beyond_trial, groups_of, parts, states, unwrapped
from hf_teleport.optimizers.rules import kept_elsewhere
from hf_teleport.optimizers.trial import shell
from hf_teleport.weights.copies import copied
from hf_teleport.weights.norms import norm
from hf_teleport.weights.ranks import ALONE, Ranks

Tensors = list[Tensor | None]

# As torch.nn.utils.clip_grad_norm_ has it.
_CLIP_EPS = 1e-6


class RehearsalError(ValueError):
    """An optimizer whose next steps can't be found out on copies."""


class Rehearsal:
    """An optimizer's next steps, as a function of the gradients, with the optimizer and the weights left as they are.

    Args:
        optimizer: the one that trains the model; also one wrapped by Accelerate.
        origin: the parameter in the optimizer that a given one stands in for (`Weights.origin`).
        max_grad_norm: gradients are clipped to this norm before the step; None or 0: they are not.
        rates: the learning rate of each parameter group at the i-th step from now. Default: the current learning rates.
        ranks: the processes that rehearse alike, and fail alike.

    Raises:
        RehearsalError: the optimizer steps weights by another one inside it, or keeps something elsewhere than in its state,
            which a copy would share.
    """

    def __init__(
        self,
        optimizer: Any,
        origin: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
        max_grad_norm: float | None = None,
        rates: Callable[[int], list[float]] | None = None,
        ranks: Ranks = ALONE,
    ):
        if why := beyond_trial(optimizer) or kept_elsewhere(optimizer):
            raise RehearsalError(
                f"{why}, so its next steps can't be rehearsed on copies. Give every weight to an optimizer in a list "
                "(self.optimizers = [...]) that steps it and keeps all in its state, or set teleport_objective='grad_norm' and "
                "teleport_rehearsal_steps=0."
            )
        self._optimizer = unwrapped(optimizer)
        self._origin = origin
        self._max_grad_norm = max_grad_norm
        self._rates = rates
        self._ranks = ranks
        self._parts, self._state = parts(optimizer), states(optimizer)
        self._groups = groups_of(optimizer)

    def step(self, parameters: Sequence[nn.Parameter], gradients: Tensors) -> Tensors:
        """What the next step adds to each parameter; None for one that has no gradient, or that the optimizer does not train.

        Weight decay is left out: it shrinks the weights whatever their gradients are.
        """
        factor, _ = self._clipping(gradients)
        return self._of_each(parameters, gradients, lambda p, g, _: self._change(p, g * factor))

    def pull_back(self, parameters: Sequence[nn.Parameter], gradients: Tensors, cotangents: Tensors) -> Tensors:
        """`(∂ step / ∂ gradients)ᵀ` times the cotangents, all lists with a tensor or None for each parameter.

        The optimizer's own part of the derivative is a central difference of two steps. It is taken to be symmetric, as it is if
        the optimizer treats every coordinate alone. The clipping's part is exact.
        """
        factor, length = self._clipping(gradients)
        size = norm(cotangents)
        if size == 0:
            return [None] * len(gradients)
        dtype = max((c.dtype for c in cotangents if c is not None), key=lambda dtype: torch.finfo(dtype).eps)
        # Of the clipped gradients' size: truncation goes with its square, rounding with its inverse.
        epsilon = torch.finfo(dtype).eps ** (1 / 3) * factor * length / size

        def bend(parameter: nn.Parameter, gradient: Tensor, cotangent: Tensor | None) -> Tensor | None:
            to_the_side = torch.zeros_like(gradient) if cotangent is None else epsilon * cotangent
            ahead, behind = (self._change(parameter, gradient * factor + sign * to_the_side) for sign in (1, -1))
            return None if ahead is None or behind is None else (ahead - behind) / (2 * epsilon)

        scaled = self._of_each(parameters, gradients, bend, cotangents)
        if factor == 1:
            return scaled
        pairs = [(s, g) for s, g in zip(scaled, gradients, strict=True) if s is not None and g is not None]
        along = sum(float((s * g).sum()) for s, g in pairs) / (length * (length + _CLIP_EPS))
        return [
            None if s is None else factor * (s if g is None else s - along * g) for s, g in zip(scaled, gradients, strict=True)
        ]

    @contextmanager
    def ahead(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Callable[[int], Tensors],
        steps: int,
        forgotten: Collection[nn.Parameter] = (),
    ) -> Iterator[None]:
        """Inside, the parameters have taken this many steps. Afterwards they and the optimizer are bit for bit what they were.

        Args:
            gradients: called before the i-th step. The parameters are then where that step begins.
            forgotten: parameters whose optimizer state will be reset.
        """
        own = {self._origin(parameter): parameter for parameter in parameters}
        remembered = {p: copied(self._state[p]) for p in set(parameters) - set(forgotten) if p in self._state}
        trials, group_of = [], {}
        for part in self._parts:
            trial = shell(part)
            trial.param_groups = [
                {**group, "params": [own[p] for p in group["params"] if p in own]} for group in part.param_groups
            ]
            mine = {parameter for group in trial.param_groups for parameter in group["params"]}
            trial.state = defaultdict(dict, {p: state for p, state in remembered.items() if p in mine})
            trials.append(trial)
            group_of.update({id(group): ours for group, ours in zip(part.param_groups, trial.param_groups, strict=True)})
        in_order = [group_of[id(group)] for group in self._optimizer.param_groups if id(group) in group_of]
        kept = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
        try:
            for parameter, data, _ in kept:
                # With the strides of the original, by which views of it are known.
                parameter.data = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device).copy_(data)
            for i in range(steps):
                found = gradients(i)
                factor, _ = self._clipping(found)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = None if gradient is None else gradient.detach() * factor
                for group, rate in zip(in_order, self._rates(i) if self._rates else [], strict=False):
                    group["lr"] = rate
                self._ranks.together(lambda: [type(trial).step(trial) for trial in trials])
            yield
        finally:
            for parameter, data, gradient in kept:
                parameter.data, parameter.grad = data, gradient

    def _clipping(self, gradients: Tensors) -> tuple[float, float]:
        """The factor by which the gradients are clipped, and their norm."""
        length = norm(gradients)
        limit = self._max_grad_norm
        return (min(1.0, limit / (length + _CLIP_EPS)) if limit else 1.0), length

    def _of_each(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Tensors,
        what: Callable[[nn.Parameter, Tensor, Tensor | None], Tensor | None],
        others: Tensors | None = None,
    ) -> Tensors:
        """`what(parameter, gradient, other)` for each parameter with a gradient, one at a time to save memory."""
        triples = list(zip(parameters, gradients, others or [None] * len(gradients), strict=True))
        return self._ranks.together(lambda: [None if g is None else what(p, g.detach(), other) for p, g, other in triples])

    @torch.no_grad()
    def _change(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """One parameter's step, on a copy of it."""
        if self._origin(parameter) not in self._groups:
            return None
        part, group = self._groups[self._origin(parameter)]
        rate = group.get("lr")
        own = nn.Parameter(parameter.detach().clone())
        own.grad = gradient.detach()
        settings = {"params": [own], "weight_decay": 0.0}
        if rate is not None:
            # At its own rate a step may be no more than the rounding of the weights that it is added to.
            settings["lr"] = torch.ones_like(rate) if isinstance(rate, Tensor) else 1.0
        trial = shell(part)
        trial.param_groups = [{**group, **settings}]
        state = self._state.get(parameter)
        trial.state = defaultdict(dict, {} if state is None else {own: copied(state)})
        type(part).step(trial)
        return (own.detach() - parameter.detach()) * (1.0 if rate is None else float(rate))
