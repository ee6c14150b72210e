"""Reports of what a teleport did. Users read them, trackers log them, and `teleports.json` keeps them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_teleport.display.quantities import duration

# Metrics that only a change of basis has.
_OF_A_TURN = ("misalignment", "misalignment_after", "angle", "second_moment_moved")


@dataclass
class LayerReport:
    """One parameter of the model: moved, or not and why.

    Attributes:
        name: the layer's dotted name, or the parameter's name if the layer owns several weights.
        role: 'q', 'k', 'v', 'o', 'qkv', 'kv', 'mlp', 'conv', 'head', 'linear', 'embedding', 'norm' or 'other'.
        shape: the weight's shape.
        null_dim: dimension of the null space of its inputs, summed over groups. None: it was not determined.
        input_dim: dimension of its inputs, summed over groups. A bias counts as one more. None: it was not determined.
        captured: share of its inputs' energy outside the null space, from the threshold to 1. With several inputs (experts) it
            is the smallest. None: it was not determined.
        moved: whether the teleport changed the weight.
        moved_by: how far it moved, ||W' - W|| / ||W||. None: unknown, before an event or for a weight that was zero.
        reason: why it did not move. Empty: it moved.
        movable: whether the weight may move in principle. Then only its inputs or the outcome of the event can keep it in place.
        second_moment_moved: how far a change of basis moved the optimizer's averages v of this weight's squared gradients,
            ||sqrt(v') - sqrt(v)|| / ||sqrt(v)||. None: the optimizer keeps none, or the event was undone.
    """

    name: str
    role: str
    shape: list[int]
    null_dim: int | None = None
    input_dim: int | None = None
    moved: bool = False
    reason: str = ""
    movable: bool = False
    moved_by: float | None = None
    captured: float | None = None
    second_moment_moved: float | None = None


@dataclass
class SymmetryReport:
    """One symmetry of the model: turned, or not and why.

    Attributes:
        kind: 'stream', 'value_output', 'query_key', 'chain' or 'scaling'.
        name: the weight that writes its features.
        blocks, size: number of rotations, and number of features that each rotates.
        weights: number of parameters that it turns.
        misalignment, misalignment_after: off-diagonal share of the gradients' second moment, in squares, before and after the
            turn. None: it was not measured.
        angle: mean angle by which the turn moves a coordinate, in degrees. None: it was not measured.
        reason: why it was left out. Empty: it was turned.
    """

    kind: str
    name: str
    blocks: int
    size: int
    weights: int
    misalignment: float | None = None
    reason: str = ""
    misalignment_after: float | None = None
    angle: float | None = None


@dataclass
class TeleportReport:
    """One teleport event. Losses and gradient norms are measured on the teleport data.

    Attributes:
        loss_before, loss_after: mean loss over all teleport batches.
        grad_norm_before, grad_norm_after: norm of the mean gradient over all teleport batches, all trainable weights.
        steps: ascent steps that were kept. A change of basis counts as one.
        stopped_because: why the steps ended on most batches. Limits: 'steps_done', 'grad_norm_cap', 'max_growth',
            'max_loss_change', 'non_finite', 'not_a_symmetry'. Nothing to do: 'nothing_movable', 'aligned' (the basis
            is good as it is), 'no_gain' (no step raised the objective). Also 'no_direction' (no layer has both a null space and
            a gradient in it). A control: 'matched_rate' (the values after the event were measured before it was undone).
        rolled_back: whether the whole event was undone. Then every weight is bit for bit what it was.
        seconds: wall-clock time of the whole event, with its measurements.
        symmetries: the symmetries that were found, if the method turns symmetries.
    """

    method: str
    loss_before: float
    loss_after: float
    grad_norm_before: float
    grad_norm_after: float
    steps: int
    stopped_because: str
    rolled_back: bool
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    symmetries: list[SymmetryReport] = field(default_factory=list)

    @property
    def misalignment(self) -> float | None:
        """Misalignment before the turn: the mean over the measured symmetries. Each block counts once."""
        return self._mean("misalignment")

    @property
    def misalignment_after(self) -> float | None:
        """Misalignment after the turn: the same mean."""
        return self._mean("misalignment_after")

    @property
    def angle(self) -> float | None:
        """The angle in degrees by which a coordinate turned: the same mean."""
        return self._mean("angle")

    @property
    def second_moment_moved(self) -> float | None:
        """How far the optimizer's second moments moved: the mean over the weights that have second moments."""
        moved = [layer.second_moment_moved for layer in self.layers if layer.second_moment_moved is not None]
        return sum(moved) / len(moved) if moved else None

    def _mean(self, name: str) -> float | None:
        measured = [(value, s.blocks) for s in self.symmetries if (value := getattr(s, name)) is not None]
        return sum(value * blocks for value, blocks in measured) / sum(blocks for _, blocks in measured) if measured else None

    @property
    def matched_rate(self) -> float:
        """A factor for the learning rate until the next epoch. It is 1, except with the control 'matched_rate'."""
        return self.grad_norm_after / self.grad_norm_before if self.stopped_because == "matched_rate" else 1.0

    @property
    def null_dim(self) -> int:
        """Sum of the null space dimensions of all layers."""
        return sum(layer.null_dim or 0 for layer in self.layers)

    @property
    def moved_share(self) -> float:
        """Share of the reported weights' elements that moved."""
        return share(self.layers, lambda layer: layer.moved)

    def metrics(self) -> dict[str, float | str]:
        """The values for a tracker and a model card, by name."""
        names = ["method", "loss_before", "loss_after", "grad_norm_before", "grad_norm_after"]
        names += ["null_dim"] if any(layer.null_dim is not None for layer in self.layers) else []
        names += ["moved_share", "steps", "seconds", "stopped_because", "rolled_back"]
        names += [] if self.matched_rate == 1 else ["matched_rate"]
        names += [name for name in _OF_A_TURN if getattr(self, name) is not None]
        return {name: getattr(self, name) for name in names}

    def summary(self) -> str:
        """One line."""
        moved, steps = sum(layer.moved for layer in self.layers), "step" if self.steps == 1 else "steps"
        return (
            f"loss {self.loss_before:.6g} -> {self.loss_after:.6g}, "
            f"gradient norm {self.grad_norm_before:.4g} -> {self.grad_norm_after:.4g}, {self._of_a_turn()}"
            f"{self.steps} {steps}, {moved} of {len(self.layers)} weights moved, {duration(self.seconds)}, "
            f"stopped: {self.stopped_because}{' (undone)' if self.rolled_back else ''}"
        )

    def _of_a_turn(self) -> str:
        told = []
        if self.misalignment is not None and self.misalignment_after is not None:
            told.append(f"misalignment {self.misalignment:.3g} -> {self.misalignment_after:.3g}")
        if self.angle is not None:
            told.append(f"turned by {self.angle:.0f} degrees")
        if self.second_moment_moved is not None:
            told.append(f"second moments moved by {self.second_moment_moved:.0%}")
        return "".join(f"{each}, " for each in told)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values. A number that is not finite becomes None, because JSON has no NaN."""
        derived = {name: getattr(self, name) for name in ("null_dim", "moved_share", *_OF_A_TURN)}
        return _json_safe({**asdict(self), **derived})


def why_immovable(layers: Iterable[LayerReport]) -> str:
    """The most frequent reasons, in one sentence."""
    reasons = Counter(layer.reason for layer in layers)
    shown = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
    return f"no weight of the model can be teleported. Reasons, with the number of weights: {shown}"


def share(layers: Iterable[LayerReport], counts: Callable[[LayerReport], bool]) -> float:
    """The share of the elements that belong to weights for which `counts` is true."""
    sizes = [(math.prod(layer.shape), counts(layer)) for layer in layers]
    return sum(size for size, yes in sizes if yes) / max(1, sum(size for size, _ in sizes))


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
