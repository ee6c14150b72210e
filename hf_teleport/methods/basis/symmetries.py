"""Find the symmetries of a model.

`find_symmetries` follows one forward, and groups what may be turned. It folds norm gains if that frees a space: `y = g * n(x)`
read by W is `y = n(x)` read by `W diag(g)`. docs/basis.md has the derivation.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_teleport.layers.point import LossFn
from hf_teleport.layers.roles import names_of_parameters
from hf_teleport.methods.basis.features import Facts, Norm, components, effective, signatures, uniform, vectors
from hf_teleport.methods.basis.follow import Follow
from hf_teleport.methods.basis.norms import recognised_norms
from hf_teleport.methods.basis.rules import RULES
from hf_teleport.methods.basis.symmetry import SMALLEST_GAIN, UNUSED, Fold, Part, Symmetry
from hf_teleport.weights.shards import whole_of
from hf_teleport.weights.whole import WHOLE, Weights


def find_symmetries(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    immovable: dict[nn.Parameter, str] | None = None,
    *,
    round_gains: bool = False,
    weights: Weights = WHOLE,
) -> tuple[list[Symmetry], dict[nn.Parameter, str]]:
    """Find what may be turned in a model, by following one forward on a batch. No weight is changed.

    Args:
        immovable: parameters that must stay, each with the reason: frozen, not selected.
        round_gains: allow symmetries that need norm gains to be made uniform.
        weights: the model's weights. Sharded weights are whole while their modules run, and gains while they are judged.

    Returns:
        All symmetries, also those that are left out; and the reason for each parameter that no symmetry turns.
    """
    with torch.enable_grad(), weights.running(), followed(model) as follow:
        follow.fix_outputs(loss_fn(model, batch))
    with weights.reading(vectors(model)):
        return Solver(model, follow.facts, immovable or {}, round_gains).solve()


@contextmanager
def followed(model: nn.Module) -> Iterator[Follow]:
    """Follow the model's forwards while the context is open."""
    follow = Follow(model, RULES)

    def run_original(wrapper: Any, args: Any, kwargs: Any, output: Any) -> None:
        follow.fix_outputs(wrapper.original_module(*args, **kwargs))

    hooks = [model.register_forward_hook(lambda module, inputs, output: follow.fix_outputs(output))]
    # PEFT trains a copy of a module in `modules_to_save`. The original reads the same features, but no forward uses it.
    originals = [each for each in model.modules() if hasattr(each, "modules_to_save") and hasattr(each, "original_module")]
    linear = [each for each in originals if isinstance(each.original_module, nn.Linear)]
    hooks += [wrapper.register_forward_hook(run_original, with_kwargs=True) for wrapper in linear]
    try:
        with recognised_norms(model, follow), follow:
            yield follow
    finally:
        for hook in hooks:
            hook.remove()


class Solver:
    """From facts to symmetries."""

    def __init__(self, model: nn.Module, facts: Facts, immovable: dict[nn.Parameter, str], round_gains: bool = False):
        self.facts = facts
        self._round_gains = round_gains
        self._rounded: set[nn.Parameter] = set()
        self._gains = {norm.gain for norm in facts.norms}
        self.names = names_of_parameters(model)
        for (parameter, _), axis in facts.axes.items():
            if parameter in immovable:
                facts.note_fixed(axis.features, immovable[parameter])
        self.axes = list(facts.axes.values())
        self.owner = [index for index, axis in enumerate(self.axes) for _ in range(axis.size)]  # of each feature

    def solve(self) -> tuple[list[Symmetry], dict[nn.Parameter, str]]:
        """Fold what can be, join norms' inputs and outputs, and read the blocks off."""
        folds = self._pass_norms()
        root = components(self.facts.count, self.facts.same)
        self._fix_for_unused(root)
        reasons = self._reasons(root)
        seen = torch.zeros(self.facts.count, dtype=torch.bool)
        for features, _ in self.facts.together:
            seen[root[features]] = True
        sums = signatures(root, self.facts.together)
        flags: dict[str, Tensor] = {}
        for features, flag in self.facts.flags:
            flags.setdefault(flag, torch.zeros(self.facts.count, dtype=torch.bool))[root[features]] = True
        symmetries = self._group(root, sums, seen, flags, reasons, folds)
        turned = {p for s in symmetries if not s.reason for p in s.parameters}
        return symmetries, {p: self._why(p, root, reasons) for p in self.names if p not in turned}

    def _fix_for_unused(self, root: Tensor) -> None:
        """A weight that the batch made no use of may belong to the stream (an expert, an image tower): then the stream stays."""
        used = {self.owner[int(f)] for features, _ in [*self.facts.together, *self.facts.fixed] for f in features[:1]}
        known = {self.axes[index].parameter for index in used}
        for features, flag in list(self.facts.flags):
            if flag not in ("residual", "normed"):
                continue
            for parameter, name in self.names.items():
                if parameter not in known and parameter.dim() > 1 and len(root[features].unique()) in whole_of(parameter).shape:
                    self.facts.note_fixed(features, f"{name}, which may belong to it, {UNUSED}")

    def _pass_norms(self) -> list[Fold]:
        """Decide for each norm whether a rotation passes: its gain is folded, is uniform, or stops it."""
        root = components(self.facts.count, self.facts.same)
        members = defaultdict(set)
        for feature, index in zip(root.tolist(), self.owner, strict=True):
            members[feature].add(index)
        stopped = {int(r) for features, _ in self.facts.fixed for r in root[features].unique()}
        inputs = {int(r) for norm in self.facts.norms for r in root[norm.inputs].unique()}
        folds: dict[nn.Parameter, Fold | None] = {}
        for factor, features in self.facts.factors:
            if not self._passes(factor):
                self.facts.note_fixed(features, f"{self.names[factor]} is not uniform and scales each feature by its own factor")
        for norm in list(self.facts.norms):
            if norm.gain not in folds:
                folds[norm.gain] = self._fold(norm, root, members, stopped | inputs)
            if folds[norm.gain] is None and not self._passes(norm.gain):
                who = self._others(norm, root, members)
                reason = f"the gain of {self.names[norm.gain]} is not uniform and cannot be folded: {who}"
                self.facts.note_fixed(norm.inputs, reason)
                self.facts.note_fixed(norm.outputs, reason)
            else:
                self.facts.note_same(norm.inputs, norm.outputs)
        return [fold for fold in folds.values() if fold is not None]

    def _passes(self, gain: nn.Parameter) -> bool:
        """Whether a gain that is not folded lets a rotation through: it is uniform, or may be made so."""
        if not uniform(gain) and self._round_gains:
            self._rounded.add(gain)
        return uniform(gain) or self._round_gains

    def _fold(self, norm: Norm, root: Tensor, members: dict[int, set[int]], stopped: set[int]) -> Fold | None:
        """The readers that can take a gain: all that touches the norm's output multiplies it with a weight."""
        roots = root[norm.outputs].tolist()
        if len(set(roots)) < len(roots) or set(roots) & stopped or bool((effective(norm).abs() < SMALLEST_GAIN).any()):
            return None
        element = {r: i for i, r in enumerate(roots)}
        readers = []
        for index in set().union(*(members[r] for r in roots)):
            axis = self.axes[index]
            if axis.parameter is norm.gain or axis.parameter is norm.bias:
                continue
            key = (axis.parameter, axis.dim)
            where = [element.get(r, -1) for r in root[axis.features].tolist()]
            if axis.parameter in self._gains or key in self.facts.writes or key not in self.facts.reads or -1 in where:
                return None
            readers.append((axis.parameter, axis.dim, torch.tensor(where)))
        return Fold(norm, readers) if readers else None

    def _others(self, norm: Norm, root: Tensor, members: dict[int, set[int]]) -> str:
        own = {norm.gain, norm.bias}
        reasons = self._reasons(root)
        if stopped := next((reasons[r] for r in root[norm.outputs].tolist() if r in reasons), ""):
            return f"its output {stopped}" if stopped.startswith("passes") else stopped
        touching = [self.axes[index] for index in sorted(set().union(*(members[r] for r in root[norm.outputs].tolist())))]
        writers = [a for a in touching if a.parameter not in own and (a.parameter, a.dim) in self.facts.writes]
        tied = [a for a in writers if (a.parameter, a.dim) in self.facts.reads]
        if not writers:
            return "its output is not only multiplied with weights"
        name = self.names[(tied or writers)[0].parameter]
        return f"{name} reads its output and writes its input" if tied else f"its output is shared with {name}"

    def _reasons(self, root: Tensor) -> dict[int, str]:
        """For each root that is fixed, the first reason."""
        reasons: dict[int, str] = {}
        for features, reason in self.facts.fixed:
            for r in root[features].unique().tolist():
                reasons.setdefault(r, reason)
        return reasons

    def _group(
        self, root: Tensor, sums: Tensor, seen: Tensor, flags: dict[str, Tensor], reasons: dict[int, str], folds: list[Fold]
    ) -> list[Symmetry]:
        """Blocks of equal signature, and symmetries of blocks that lie in the same axes."""
        fixed = torch.zeros(self.facts.count, dtype=torch.bool)
        fixed[list(reasons)] = True
        roots = (seen & (root == torch.arange(len(root)))).nonzero().flatten()
        blocks: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for r, signature in zip(roots.tolist(), sums[roots].tolist(), strict=True):
            blocks[signature, bool(fixed[r])].append(r)
        where: dict[int, list[int]] = defaultdict(list)
        for feature, r in enumerate(root.tolist()):
            where[r].append(feature)
        groups: dict[tuple, list[list[int]]] = defaultdict(list)
        for block in blocks.values():
            axes = [self.owner[feature] for feature in where[block[0]]]
            kind = self._kind(block[0], flags)
            groups[kind, len(block), tuple(axes), reasons.get(block[0], "")].append(block)
        symmetries = []
        for (kind, size, axes, reason), members in groups.items():
            symmetry = self._symmetry(kind, size, axes, members, where, root, reason, flags, folds)
            if symmetry is not None:
                symmetries.append(symmetry)
        return symmetries

    def _occurrences(self, features: list[int]) -> dict[int, list[int]]:
        """The positions of one root's features in each axis that has some."""
        positions: dict[int, list[int]] = {}
        for feature in features:
            index = self.owner[feature]
            positions.setdefault(index, []).append(feature - self.axes[index].first)
        return positions

    @staticmethod
    def _kind(r: int, flags: dict[str, Tensor]) -> str:
        for flag, kind in (("contracted", "query_key"), ("mixed", "value_output"), ("residual", "stream")):
            if flag in flags and flags[flag][r]:
                return kind
        return "chain"

    def _symmetry(
        self,
        kind: str,
        size: int,
        axes: tuple[int, ...],
        members: list[list[int]],
        where: dict[int, list[int]],
        root: Tensor,
        reason: str,
        flags: dict[str, Tensor],
        folds: list[Fold],
    ) -> Symmetry | None:
        parts = []
        occurrences = [[self._occurrences(where[r]) for r in block] for block in members]
        for index in dict.fromkeys(axes):
            axis, copies = self.axes[index], axes.count(index)
            found = [[feature.get(index, []) for feature in block] for block in occurrences]  # (H, k, r)
            if any(len(positions) != copies for block in found for positions in block):
                reason = reason or "its features occur unevenly in the weights"
                continue
            positions = torch.tensor(found).transpose(1, 2)
            parts.append(Part(axis.parameter, axis.dim, positions, (axis.parameter, axis.dim) in self.facts.reads))
        gains = [part.parameter for part in parts if part.parameter in self._gains]
        gains += [factor for factor, features in self.facts.factors if bool((root[features] == members[0][0]).any())]
        parts = [part for part in parts if part.parameter not in self._gains]
        matrices = [part for part in parts if part.parameter.dim() > 1]
        if sum(part.positions.shape[1] for part in matrices) < 2 and not (matrices and reason):
            return None
        first = members[0][0]
        flagged = {flag for flag, is_flagged in flags.items() if is_flagged[first]}
        writers = [part for part in matrices if (part.parameter, part.dim) in self.facts.writes] or matrices
        name = self.names[writers[0].parameter].removesuffix(".weight")
        if size == 1 and not reason:
            one_sided = all(((part.parameter, part.dim) in self.facts.writes) != part.reads for part in parts)
            if kind == "chain" and not flagged & {"normed", "centred"} and one_sided and any(part.reads for part in parts):
                kind = "scaling"
            else:
                reason = self._split_reason(first, where)
        return Symmetry(
            kind,
            name,
            len(members),
            size,
            parts=parts,
            gains=gains,
            reason=reason,
            centred="centred" in flagged,
            folds=[fold for fold in folds if fold.norm.gain in set(gains)],
            rounded=[gain for gain in gains if gain in self._rounded],
        )

    def _split_reason(self, r: int, where: dict[int, list[int]]) -> str:
        features = set(where[r])
        for split, reason in self.facts.split:
            if features & set(split.tolist()):
                return reason
        return "a single feature, with nothing to be turned into"

    def _why(self, parameter: nn.Parameter, root: Tensor, reasons: dict[int, str]) -> str:
        """Why a parameter is not turned: the reason of its first axis that has one."""
        for dim in range(parameter.dim()):
            axis = self.facts.axes.get((parameter, dim))
            for r in [] if axis is None else root[axis.features].tolist():
                if r in reasons:
                    return reasons[r]
        return "no rotation of its features is free"
