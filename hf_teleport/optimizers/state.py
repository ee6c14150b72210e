"""What an optimizer remembers of a weight's gradients: turned when the weight gets another basis, or started anew.

Averages of gradients turn exactly as the weights do. Averages of squared gradients do not: `v <- (Q∘Q) v` is what they would be
if the gradient's coordinates were uncorrelated, and keeps their sum. Which tensor is what, `optimizers.rules` finds out.

After a turn everything linear in the gradients is what it would be if all of training had been in the new basis. Squares follow
the rule that was chosen. If the optimizer's steps do not depend on the basis (SGD, Muon, projected states), the next update is
the turned update. Otherwise it is Adam's update with the squares of that rule.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_teleport.optimizers.hidden import hidden
from hf_teleport.optimizers.leaves import Leaf, leaves
from hf_teleport.optimizers.parts import beyond_trial, groups_of, keeps_copies, parts, states, unwrapped
from hf_teleport.optimizers.rules import Judgement, Rule, judge
from hf_teleport.optimizers.trial import counts, keeps_own_counts, renewed, starts_anew
from hf_teleport.weights.copies import tensors_in
from hf_teleport.weights.isolation import preserved_rng
from hf_teleport.weights.shards import whole_of

Turning = Callable[[Tensor, Any, Tensor], Tensor]


class OptimizerState:
    """The state of an optimizer, turned along with the weights.

    Args:
        optimizer: also one wrapped by Accelerate, or one that consists of several (`optimizers.parts`).
        squares: what becomes of averages of squares in `turn`: the squared matrix turns them, or they stay ('keep').
    """

    def __init__(self, optimizer: Any, squares: Literal["turn", "keep"] = "turn"):
        self.optimizer = unwrapped(optimizer)
        self.state = states(optimizer)
        self._squares = squares
        self._judged = judge(optimizer)

    def turn(self, part: Any, matrices: Tensor, turn_axis: Turning, shares: Tensor | None = None) -> None:
        """Turn what is remembered of a part's parameter; `turn_axis(tensor, part, matrices)` works in place.

        Args:
            shares: how to spread averages of squares instead of turning them, as `put_shares` takes it.
        """
        for leaf, rule, own in self._turning(part.parameter, part.dim):
            if shares is not None and _is_of_squares(rule):
                _spread(leaf, rule, own[0], part, shares)
            elif rule.square and self._squares == "keep":
                continue
            elif matrices.shape[-1] == 1:  # a scaling
                self._change(leaf, own, part, matrices.abs().pow(rule.degree / len(own)), turn_axis)
            elif rule.square and _is_root(rule):
                leaf.write(turn_axis(leaf.read().square(), _At(own[0], part.positions), matrices.square()).sqrt())
            else:
                self._change(leaf, own, part, matrices.square() if rule.square else matrices, turn_axis)

    def _change(self, leaf: Leaf, own: tuple[int, ...], part: Any, matrices: Tensor, turn_axis: Turning) -> None:
        numbers = leaf.read()
        for axis in own:
            turn_axis(numbers, _At(axis, part.positions), matrices)
        leaf.write(numbers)

    def scale(self, parameter: nn.Parameter, dim: int, factors: Tensor) -> None:
        """The parameter's gradients are multiplied by factors along an axis."""
        for leaf, rule, own in self._turning(parameter, dim):
            numbers = leaf.read()
            for axis in own:
                numbers.mul_(laid_along(factors.abs().pow(rule.degree / len(own)), axis, numbers))
            leaf.write(numbers)

    def level(self, parameter: nn.Parameter) -> None:
        """A norm's gain has a new gradient in a new basis, unknown before: no momentum, and the mean of the squares."""
        for leaf, rule, _ in self._turning(parameter, 0):
            numbers = leaf.read()
            leaf.write(numbers.fill_(float(numbers.mean()) if rule.square else 0.0))

    def put_shares(self, part: Any, shares: Tensor) -> None:
        """Along a turned axis, let squares keep their sums over the features and spread them as given: `v' = (Σ v) * share`.

        No rotation changes those sums. What a turn leaves in place of the rest is flat, so that a coordinate with a small
        gradient would be held back for long.

        Args:
            part: a parameter, its axis `dim`, and positions (H, r, k) along it, for each of H blocks of k features its r copies.
            shares: of each feature in the squared gradients of its block, (H, k), summing to one.
        """
        for leaf, rule, own in self._turning(part.parameter, part.dim):
            if _is_of_squares(rule):
                _spread(leaf, rule, own[0], part, shares)

    def second_moment_moved(self, parameter: nn.Parameter, before: dict[str, Any]) -> tuple[float, float]:
        """How far the averages v of squared gradients are from what they were.

        Args:
            before: a copy of what was kept for the parameter.

        Returns:
            ||sqrt(v') - sqrt(v)|| and ||sqrt(v)||, both zero if no average of squares is kept.
        """
        state = self.state.get(parameter, {})
        judgement = self._judgement(parameter, state)
        rules = {} if judgement is None else judgement.rules
        distance = length = 0.0
        old = leaves(before)
        for path, leaf in leaves(state).items():
            rule = rules.get(path)
            if rule is not None and _is_of_squares(rule) and path in old:
                now, then = (each.read() if _is_root(rule) else each.read().sqrt() for each in (leaf, old[path]))
                distance += float((now - then).square().sum())
                length += float(then.square().sum())
        return distance**0.5, length**0.5

    def averages(self, parameter: nn.Parameter) -> int:
        """How many tensors that turn are kept for a parameter, or will be once it is trained."""
        return max((sum(bool(rule.axes) for rule in judged.rules.values()) for judged in self._candidates(parameter)), default=0)

    def tensors(self, parameter: nn.Parameter) -> list[Tensor]:
        """All tensors that are kept for a parameter, those included of which quantised ones consist."""
        return list(tensors_in(self.state.get(parameter, {})))

    def objection(self, parameter: nn.Parameter) -> str:
        """Why what is kept for a parameter can't be turned, and was not known before; empty: it can be."""
        state = self.state.get(parameter)
        if not state:
            return ""
        if any(len(self._keeping[memory]) > 1 for memory in _memory(state)):
            return f"{type(self.optimizer).__name__} keeps one tensor for several weights"
        if self._judgement(parameter, state) is not None:
            return ""
        reasons = [judged.objection(state, parameter.shape) for judged in self._candidates(parameter)] or [
            "it was not trained before"
        ]
        why = next(filter(None, reasons), "weights of this shape have states with different rules")
        return f"{type(self.optimizer).__name__}: {why}"

    @cached_property
    def _keeping(self) -> dict[int, set[nn.Parameter]]:
        """The parameters whose tensors are at each place in memory."""
        found: dict[int, set[nn.Parameter]] = defaultdict(set)
        for parameter in self._judged:
            for memory in _memory(self.state.get(parameter) or {}):
                found[memory].add(parameter)
        return found

    def _turning(self, parameter: nn.Parameter, dim: int) -> Iterator[tuple[Leaf, Rule, tuple[int, ...]]]:
        """Each tensor that an axis of a parameter concerns, its rule, and its axes that go with that one."""
        state = self.state.get(parameter)
        if not state:
            return
        judgement = self._judgement(parameter, state)
        if judgement is None:
            raise ValueError(
                f"what is kept for a weight of shape {list(parameter.shape)} can't be turned ({self.objection(parameter)}). "
                "Set optimizer_state='reset' to start it anew."
            )
        for path, leaf in leaves(state).items():
            if own := judgement.rules[path].axes.get(dim):
                yield leaf, judgement.rules[path], own

    def _candidates(self, parameter: nn.Parameter) -> list[Judgement]:
        """The judgement of a parameter; of one that stands in for another, those of all with its shape."""
        own = self._judged.get(parameter)
        shape = whole_of(parameter).shape
        return [own] if own else [j for stored, j in self._judged.items() if stored.shape == shape]

    def _judgement(self, parameter: nn.Parameter, state: dict[str, Any]) -> Judgement | None:
        fitting = [j for j in self._candidates(parameter) if not j.objection(state, parameter.shape)]
        return fitting[0] if fitting and all(j.rules == fitting[0].rules for j in fitting) else None


def _memory(state: dict[str, Any]) -> set[int]:
    """Where the plain tensors of a state begin in memory."""
    return {leaf.tensor.data_ptr() for leaf in leaves(state).values() if type(leaf.tensor) is Tensor}


class _At:
    """A part's positions in a tensor that may lack some of the parameter's axes."""

    def __init__(self, dim: int, positions: Tensor):
        self.dim, self.positions = dim, positions


def _is_of_squares(rule: Rule) -> bool:
    """Whether a tensor is an average of squared gradients, or of their roots, and no mere sign or count."""
    return rule.square and rule.degree > 0.5


def _is_root(rule: Rule) -> bool:
    """Whether a tensor holds roots of squares (Adamax's largest gradients), which turn and spread as squares."""
    return 0.75 < rule.degree < 1.25


def _spread(leaf: Leaf, rule: Rule, axis: int, part: Any, shares: Tensor) -> None:
    numbers = leaf.read()
    rows = numbers.movedim(axis, 0)
    at = part.positions.flatten().to(rows.device)
    blocks = rows[at].reshape(*part.positions.shape, -1)  # (H, r, k, n)
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    blocks = blocks.square() if _is_root(rule) else blocks
    spread = blocks.sum(2, keepdim=True) * shares.to(blocks)[:, None, :, None]
    rows[at] = (spread.sqrt() if _is_root(rule) else spread).reshape(-1, *rows.shape[1:]).to(rows)
    leaf.write(numbers)


def laid_along(factors: Tensor, axis: int, like: Tensor) -> Tensor:
    """Factors (n,) shaped so that they multiply an axis of a tensor."""
    return factors.reshape([-1 if d == axis else 1 for d in range(like.dim())]).to(like)


def forget(
    optimizer: Any, parameters: Iterable[nn.Parameter], origin: Callable[[nn.Parameter], nn.Parameter] = lambda p: p
) -> None:
    """Start anew what an optimizer remembers of these parameters, as a new optimizer would.

    Where a group counts steps for all of its parameters, those start anew together.

    Args:
        origin: the parameter in the optimizer that a given one stands in for.
    """
    state, groups, new = states(optimizer), groups_of(optimizer), {}
    with preserved_rng():
        for stand_in in parameters:
            stored = origin(stand_in)
            if stored not in groups:
                continue
            part, group = groups[stored]
            if id(part) not in new:
                new[id(part)] = renewed(part), {id(each): counts(part, each) for each in part.param_groups if each["params"]}
            fresh, counted = new[id(part)]
            shared = counted[id(group)]
            begun = any(name in group for name in shared)
            for parameter in group["params"] if begun else [stored]:
                for key in {parameter, stand_in if parameter is stored else parameter}:
                    state.pop(key, None)
                    if fresh.state.get(parameter):
                        state[key] = fresh.state[parameter]
            if begun:
                start = next(each for each in fresh.param_groups if any(p is stored for p in each["params"]))
                for name in shared:
                    group.pop(name, None)
                    if name in start:
                        group[name] = start[name]


# Optimizers that have been looked at. What hides something later leaves events out, and does not end a run.
_CLEAR: WeakSet[Any] = WeakSet()


def check_optimizer(optimizer: Any, *, reset: bool = False) -> None:
    """Make sure that a change of basis makes sense for an optimizer, and that its state can follow.

    Raises:
        ValueError: an optimizer whose steps do not depend on the basis, or one with a state for which there is no rule.
    """
    optimizer = unwrapped(optimizer)
    name = type(optimizer).__name__
    if copying := [type(part).__name__ for part in (optimizer, *parts(optimizer)) if keeps_copies(part)]:
        raise ValueError(
            f"{copying[0]} seems to keep copies of the weights, which would stay in the old basis. Use an optimizer that keeps "
            "none, such as AdamW."
        )
    if why := beyond_trial(optimizer):
        raise ValueError(
            f"{why}, so what becomes of its state can't be found out. Give every weight to an optimizer in a list "
            "(self.optimizers = [...]) that steps it, or use teleport_method='null_space'."
        )
    judged = judge(optimizer)
    if untried := [judgement.problem for judgement in judged.values() if not judgement.tried]:
        raise ValueError(
            f"{name} can neither be turned nor started anew: {untried[0]}. Use an optimizer such as AdamW, or "
            "teleport_method='null_space'."
        )
    if optimizer not in _CLEAR and (why := hidden(optimizer)):
        raise ValueError(
            f"{why}: a change of basis reaches only what is in the state of a parameter (optimizer.state[parameter]). Keep it "
            "there or take it off, or use teleport_method='null_space'."
        )
    if reset:
        with preserved_rng():
            kinds = {(id(part), id(group)): (part, group) for part, group in groups_of(optimizer).values()}
            left = [
                type(part).__name__
                for part, group in kinds.values()
                if keeps_own_counts(part, group) or not starts_anew(part, group, forget)
            ]
        if left:
            raise ValueError(
                f"{left[0]} counts steps, or keeps averages, where no reset of some weights reaches. Use an optimizer such as "
                "AdamW, or teleport_method='null_space'."
            )
    # Norms' gains and biases see a basis that no matrix does, but there is little to win with them.
    matrices = [judgement for parameter, judgement in judged.items() if parameter.dim() > 1] or list(judged.values())
    if matrices and not any(judgement.sees for judgement in matrices):
        raise ValueError(
            f"a change of basis does nothing for {name}: its steps are the same in every basis. Use an optimizer that looks at "
            "each coordinate alone (AdamW, Adafactor, Adagrad, ...), or teleport_method='null_space'."
        )
    for parameter, judgement in judged.items():
        if judgement.problem and not reset:
            raise ValueError(
                f"{name} can't follow a change of basis of a weight of shape {list(parameter.shape)}: {judgement.problem}. "
                "Set teleport_optimizer_state='reset' to start its state anew for the weights that turn."
            )
    _CLEAR.add(optimizer)
