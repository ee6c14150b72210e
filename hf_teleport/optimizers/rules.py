"""What becomes of each tensor that an optimizer keeps when the weight gets another basis, found from the optimizer itself.

An optimizer that looks at each coordinate alone does the same when coordinates are permuted and their signs change. So a new
optimizer of the same kind is tried on a small weight, as it is and with one axis permuted and signed. Then each tensor in its
state shows what it is:

- it stays: it has no coordinates on that axis (an average over it; one in a basis of the optimizer's own: GaLore, SOAP);
- it turns as the gradient does: an average of gradients or steps; a basis or preconditioner, which may turn on two axes;
- it loses the signs: an average of squares, or of absolute values;
- anything else, a copy of the weights included, has no rule, nor has an optimizer whose steps are not permuted and signed alike.

Gradients of twice the size show with which power of the gradient's size a tensor scales. The rules are then compared with what
the optimizer keeps for a weight of the real shape. No name of an optimizer or of a tensor matters, except `ortho_matrix`. GaLore
and APOLLO call their projector so, and one that is drawn at random does not show that it must turn with the weight.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_teleport.optimizers.leaves import Leaf, leaves, opaque
from hf_teleport.optimizers.parts import groups_of, is_count, own_attributes
from hf_teleport.optimizers.trial import Group, Trial, at_start, carried, marked, normal, ones, tried
from hf_teleport.weights.isolation import preserved_rng

# RAdam begins as plain momentum, and looks at each coordinate from its sixth step on.
_STEPS = 8
# Sizes of the weights that are tried: small; and above those from which Adafactor-like states are factored.
_SIZES = ((6, 5, 4, 3, 2), (160, 128, 4, 3, 2))
_PROJECTOR = "ortho_matrix"
# A state of a weight with more elements is looked at on one of that many, with the same proportions.
_MOST = 2**22
# Muon computes in bfloat16; what has another rule is another tensor altogether.
_NEAR = 0.05
# A step after a turn of 4-bit averages is off by 0.07, and one after a turn of only a part of them by far more.
_ABOUT = 0.3


@dataclass(frozen=True)
class Rule:
    """What becomes of one kept tensor.

    Attributes:
        axes: for each axis of the parameter the axes of the tensor that turn with it; none: it stays.
        dims: how many axes the tensor has.
        square: whether it holds squares, or absolute values, and turns by the squared matrix.
        degree: the power of the gradient's size that it goes with.
    """

    axes: dict[int, tuple[int, ...]]
    dims: int
    square: bool
    degree: float

    def fits(self, leaf: Leaf, shape: torch.Size) -> bool:
        """Whether a tensor can be what the rule was found for, in the state of a parameter of this shape."""
        turned = ((own, axis) for axis, all_own in self.axes.items() for own in all_own)
        return leaf.readable and len(leaf.shape) == self.dims and all(leaf.shape[own] == shape[axis] for own, axis in turned)


@dataclass
class Judgement:
    """What was found of an optimizer with the options of one group, for parameters of one number of axes.

    Attributes:
        rules: by the path in the state.
        problem: why some of the state has no rule; empty: all has.
        tried: whether it could be tried at all.
        sees: whether the steps depend on the basis.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    problem: str = ""
    sees: bool = True
    tried: bool = True

    def objection(self, state: dict[str, Any], shape: torch.Size) -> str:
        """Why a state does not follow these rules; empty: it does."""
        if hidden := opaque(state):
            return f"it keeps {', '.join(hidden)}, which can't be looked into"
        for path, leaf in leaves(state).items():
            rule = self.rules.get(path)
            if rule is None:
                return f"it keeps {path}, for which there is no rule"
            if not rule.fits(leaf, shape):
                return f"it keeps {path} as {_kind(leaf)}, which is not what was expected"
        return ""


def _kind(leaf: Leaf) -> str:
    return f"{type(leaf.tensor).__name__} {list(leaf.shape)} of {leaf.tensor.dtype}"


_JUDGED: WeakKeyDictionary[Any, dict[Any, Judgement]] = WeakKeyDictionary()


def judge(optimizer: Any) -> dict[nn.Parameter, Judgement]:
    """For each trained parameter with axes what becomes of its state; found once for each kind of group and shape."""
    found: dict[nn.Parameter, Judgement] = {}
    alike: dict[Any, dict[Any, Judgement]] = {}
    with preserved_rng():
        for parameter, (part, group) in groups_of(optimizer).items():
            if parameter.requires_grad and parameter.dim() and parameter.is_floating_point():
                # Of those in hooks there is one for each parameter.
                kind = type(part), repr([(name, value) for name, value in own_attributes(part).items() if is_count(value)])
                known = _JUDGED.setdefault(part, alike.setdefault(kind, {}))
                key = (_options(group), marked(parameter), parameter.shape, parameter.dtype)
                if key not in known:
                    known[key] = _judged(part, group, parameter, known)
                found[parameter] = known[key]
    return found


def kept_elsewhere(optimizer: Any) -> str:
    """What copies of an optimizer's state would lack, found for each kind of group; empty: nothing."""
    seen = set()
    with preserved_rng():
        for part, group in groups_of(optimizer).values():
            kind = (type(part), _options(group))
            if kind in seen:
                continue
            seen.add(kind)
            try:
                own = ones(group)
                found = tried(part, at_start(part, group), own.detach(), [own.detach()] * 2, like=own)
            except Exception:  # what can't be tried is not rehearsed either
                continue
            if found.outside is not None and not opaque(found.state):
                return f"{type(part).__name__} keeps a tensor elsewhere than in its state"
    return ""


def _options(group: Group) -> str:
    """What sets a group apart; its rates and what else changes as training goes on do not."""
    varying = ("params", "lr", "initial_lr", "step")
    return repr(
        sorted((k, v) for k, v in group.items() if k not in varying and isinstance(v, (bool, str, int, tuple, type(None))))
    )


def _judged(part: Any, group: Group, parameter: nn.Parameter, known: dict[Any, Judgement]) -> Judgement:
    try:
        group = at_start(part, group)
        small = {**group, "rank": 2} if isinstance(group.get("rank"), int) else group
        probed = _probe(part, group, parameter)
        if probed.outside is not None and not opaque(probed.state):
            return Judgement(problem=_elsewhere(probed.outside), tried=False)
        real = part.state.get(parameter) or probed.state
        judgement = Judgement(problem="nothing was tried")
        wide = parameter.dim() > 1 and parameter.shape[0] < parameter.shape[1]
        for sizes in _SIZES:
            size = list(sizes[: parameter.dim()])
            if wide:
                size[:2] = size[1::-1]
            key = (_options(group), marked(parameter), parameter.dim(), wide, sizes, parameter.dtype)
            if key not in known:
                known[key] = _of_a_stand_in(part, small, torch.Size(size), parameter)
            judgement = known[key]
            if judgement.problem:
                return judgement
            shape = _probed(parameter) if parameter not in part.state else parameter.shape
            objection = judgement.objection(real, shape)
            if not objection:
                return judgement
        return replace(judgement, problem=objection)
    except Exception as error:  # whatever an optimizer of another library needs
        return Judgement(problem=f"it could not be tried: {str(error) or type(error).__name__}", tried=False)


def _probed(parameter: nn.Parameter) -> torch.Size:
    shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    cut = max(1.0, shape.numel() / _MOST) ** (1 / len(shape))
    return torch.Size(max(1, math.ceil(n / cut)) for n in shape)


def _probe(part: Any, group: Group, parameter: nn.Parameter) -> Trial:
    """Two steps on a weight of the real shape."""
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (normal(_probed(parameter), generator, parameter) for _ in range(3))
    return tried(part, group, weight, gradients, like=parameter)


def _elsewhere(shape: tuple[int, ...]) -> str:
    return f"it keeps a tensor {list(shape)} elsewhere than in its state"


def _of_a_stand_in(part: Any, group: Group, shape: torch.Size, like: Tensor) -> Judgement:
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (normal(shape, generator, like) for _ in range(_STEPS + 1))
    signed = [_signed_permutation(n, like) for n in shape]
    rotated = [torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.to(weight) for n in shape]
    projectors: dict[str, Tensor] = {}

    def noted(state: dict[str, Any]) -> None:
        projectors.update({path: leaf.read().clone() for path, leaf in leaves(state).items() if path.endswith(_PROJECTOR)})
        _start_averages(state, {})

    plain = tried(part, group, weight, gradients, noted, like)
    if plain.outside is not None and not opaque(plain.state):
        return Judgement(problem=_elsewhere(plain.outside), tried=False)
    if not plain.update.any() and not plain.state:  # D-Adaptation's first steps are smaller than a weight's last digit
        return Judgement(problem="its steps do not change a weight that is given to a new one like it", tried=False)

    def after(axis: int, matrix: Tensor) -> Trial:
        def turned(state: dict[str, Any]) -> None:
            _start_averages(state, {path: _projector(tensor, axis, matrix, shape) for path, tensor in projectors.items()})

        return tried(part, group, along(weight, axis, matrix), [along(g, axis, matrix) for g in gradients], turned)

    of_signed = [after(axis, matrix) for axis, matrix in enumerate(signed)]
    sees = any(not _same(after(axis, matrix).update, along(plain.update, axis, matrix)) for axis, matrix in enumerate(rotated))
    other_weight, others, twice = (
        leaves(tried(part, group, *one, noted).state)
        for one in (
            (-weight.roll(1, 0), gradients),
            (weight, [gradient.roll(1, -1) for gradient in reversed(gradients)]),
            (weight, [2 * gradient for gradient in gradients]),
        )
    )
    judgement = Judgement(sees=sees)
    if not all(_same(trial.update, along(plain.update, i, signed[i])) for i, trial in enumerate(of_signed)):
        judgement.problem = "it takes other steps where features are permuted and change their signs"
    if hidden := opaque(plain.state):
        judgement.problem = f"it keeps {', '.join(hidden)}, which can't be looked into"
    turned = [leaves(trial.state) for trial in of_signed]
    for path, leaf in leaves(plain.state).items():
        if not leaf.readable:
            judgement.problem = f"it keeps {path} as {_kind(leaf)}, which can't be read as numbers"
            continue
        numbers = leaf.read().float()
        found = [
            _turning(numbers, turned[axis][path].read().float(), shape[axis], signed[axis].float()) for axis in range(like.dim())
        ]
        # What no gradient has changed yet does not show what it is.
        fresh = torch.equal(numbers, others[path].read().float()) and not path.endswith(_PROJECTOR)
        if not projectors and not _same(other_weight[path].read().float(), numbers):
            judgement.problem = f"it keeps {path}, which goes with the values of the weights"
            continue
        if any(own is None for own, _ in found) or (fresh and set(numbers.shape) & set(shape)):
            judgement.problem = f"it keeps {path}, for which there is no rule"
            continue
        axes = {axis: own for axis, (own, _) in enumerate(found) if own is not None}
        ratio = float(twice[path].read().float().norm() / numbers.norm())
        judgement.rules[path] = Rule(axes, numbers.dim(), any(square for _, square in found), round(math.log2(ratio), 1) + 0.0)
    if not judgement.problem and not _is_all(judgement.rules, part, group, like, weight, gradients, signed[0]):
        return Judgement(problem="its next step depends on something beside what it keeps in its state", tried=False)
    return judgement


def _is_all(
    rules: dict[str, Rule], part: Any, group: Group, like: Tensor, weight: Tensor, gradients: list[Tensor], signed: Tensor
) -> bool:
    """Whether the next step is the turned one if a weight and its state turn in midst of training: nothing else was to turn."""
    # The other weight's squares differ from row to row, so that its step shows if they are kept together with those that turn.
    rows = torch.tensor([1.0 if i % 2 else 10.0 for i in range(len(weight))]).to(weight).view(-1, *[1] * (weight.dim() - 1))
    weights, of_both = [weight, -weight], [gradients, [gradient.roll(1, 0) * rows for gradient in gradients]]
    plain, beside = carried(part, group, like, weights, of_both)

    def turn(own: Tensor, state: dict[str, Any], gradient: Tensor) -> Tensor:
        if leaves(state).keys() - rules.keys():  # also those of the other weight: the step to come shows that none was turned
            return gradient
        own.copy_(along(own, 0, signed))
        for path, leaf in leaves(state).items():
            numbers = leaf.read()
            for dim in rules[path].axes.get(0, ()):
                numbers = along(numbers, dim, (signed.abs() if rules[path].square else signed).to(numbers))
            leaf.write(numbers)
        return along(gradient, 0, signed)

    found, other = carried(part, group, like, weights, of_both, turn)
    return _same(found, along(plain, 0, signed), _ABOUT) and _same(other, beside, _ABOUT)


def _signed_permutation(size: int, like: Tensor) -> Tensor:
    """Each coordinate becomes the next; every other one, and the first two of them unlike, changes its sign."""
    signs = torch.tensor([1.0 if i % 3 else -1.0 for i in range(size)])
    return (torch.eye(size).roll(1, 0) * signs).to(device=like.device, dtype=like.dtype)


def along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """A matrix times the coordinates along an axis."""
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis).contiguous()


def _projector(tensor: Tensor, axis: int, matrix: Tensor, shape: torch.Size) -> Tensor:
    own = [d for d, n in enumerate(tensor.shape) if n == shape[axis]]
    return along(tensor, own[0], matrix.to(tensor)) if own else tensor


def _start_averages(state: dict[str, Any], projectors: dict[str, Tensor]) -> None:
    """Where the optimizer projects: give it its projectors, and let the averages begin with them."""
    found = leaves(state)
    if not any(path.endswith(_PROJECTOR) for path in found):
        return
    for path, leaf in found.items():
        if path in projectors:
            leaf.tensor.copy_(projectors[path])
        elif not path.endswith(_PROJECTOR):
            leaf.write(torch.zeros_like(leaf.read()))


def _turning(plain: Tensor, turned: Tensor, size: int, matrix: Tensor) -> tuple[tuple[int, ...] | None, bool]:
    """Which axes of a tensor turn with an axis of the parameter, and whether by the squared matrix; None: no rule fits."""
    if not plain.any() or not turned.isfinite().all() or plain.shape != turned.shape:
        return None, False
    candidates = [d for d, n in enumerate(plain.shape) if n == size]
    # A constant, which nothing changes, does not show what it is.
    if candidates and bool((plain == plain.flatten()[0]).all()):
        return None, False
    if _same(turned, plain) or (candidates != list(range(plain.dim())) and _same_but_signs(turned, plain, [])):
        return (), False
    for own in chain.from_iterable(combinations(candidates, size) for size in range(1, len(candidates) + 1)):
        expected, absolute = plain, plain
        for axis in own:
            expected, absolute = along(expected, axis, matrix), along(absolute, axis, matrix.abs())
        if len(own) == 1 and bool((plain >= 0).all()) and _same(turned, absolute):
            return own, True
        if _same(turned, expected) or _same_but_signs(turned, expected, own):
            return own, False
    return None, False


def _same(found: Tensor, expected: Tensor, near: float = _NEAR) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= near * expected.norm())


def _same_but_signs(found: Tensor, expected: Tensor, turned: Any) -> bool:
    """Whether they are the same up to the sign of each slice: a singular vector may have either."""
    if found.dim() < 2 or found.shape != expected.shape:
        return False
    for axis in set(range(found.dim())) - set(turned):
        others = [d for d in range(found.dim()) if d != axis]
        sign = (found * expected).sum(others, keepdim=True).sign()
        if _same(found, expected * sign):
            return True
    return False
