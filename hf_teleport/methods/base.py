"""The interface of a method; schedule, guard, report, data and ranks know no more than this."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.point import LossFn, Point, evaluate
from hf_teleport.methods.reasons import NO_DIRECTION
from hf_teleport.optimizers.rehearsal import Rehearsal
from hf_teleport.report import LayerReport, SymmetryReport
from hf_teleport.weights.ranks import ALONE, Ranks
from hf_teleport.weights.snapshot import Snapshot


class Move:
    """A step that was proposed: made from where the weights stand, and then made shorter or taken back.

    Args:
        carry_out: `carry_out(1.0)` makes it in full, `carry_out(0.5)` by half.
        snapshot: makes a copy of all that it may change.
        straight: half of it is half the way that the weights have gone. What it is made of is let go then once it is made.
    """

    def __init__(self, carry_out: Callable[[float], None], snapshot: Callable[[], Snapshot], straight: bool = False):
        self._carry_out: Callable[[float], None] | None = carry_out
        self._snapshot = snapshot
        self._straight = straight
        self.fraction = 1.0

    def __call__(self, fraction: float) -> None:
        """Carry it out with no way back."""
        if self._carry_out is None:
            raise RuntimeError("this move is made, and what it was made of is gone; use another that the method proposes.")
        self._carry_out(fraction)

    def make(self) -> None:
        """In full, after a copy to return to."""
        self._copy = self._snapshot()
        self(1.0)
        if self._straight:
            self._carry_out = None

    def halve(self) -> None:
        """Make it half as long as it is."""
        self.fraction /= 2
        if self._straight:
            self._copy.halve()
        else:
            self._copy.restore()
            self(self.fraction)

    def undo(self) -> None:
        """The weights are bit for bit what they were."""
        self._copy.restore()


class Method(ABC):
    """One event's way of moving. Made anew for each event, in the order survey*, fit, (begin, propose*)*, review*.

    Args:
        optimizer: the one that trains the model, for methods that change what it remembers.
        ranks: the processes that each have a share of every batch.

    Attributes:
        once: whether the event is a single move that holds for every input, and not an ascent on each batch in turn.
        at_rest: why a weight that may move does not, though the event makes a step.
        rehearsal: the optimizer's next steps, set before `survey` for objectives that are about them.
        reports: one for each parameter, filled by `survey`, `fit` and `begin`.
        symmetries: what was turned, for a method that knows symmetries.
        objection: why the event must be undone whatever its loss, set by `review`.
        trusting: whether a move is taken to leave activations and loss as they were, so that `evaluate_again` need not look. The
            loss is then looked at after the last step on a batch; if it has moved, the event starts anew without trust.
    """

    once: ClassVar[bool] = False
    at_rest: ClassVar[str] = NO_DIRECTION
    trusting: bool = False

    def __init__(self, model: nn.Module, loss_fn: LossFn, config: TeleportConfig, optimizer: Any = None, ranks: Ranks = ALONE):
        self.model = model
        self.loss_fn = loss_fn
        self.config = config
        self.optimizer = optimizer
        self.ranks = ranks
        self.rehearsal: Rehearsal | None = None
        self.reports: dict[nn.Parameter, LayerReport] = {}
        self.symmetries: list[SymmetryReport] = []
        self.objection = ""

    @staticmethod
    @abstractmethod
    def passes(config: TeleportConfig) -> int:
        """Forward and backward passes over a batch in one event, at most: what it costs but for decompositions."""

    @staticmethod
    def on_shards(config: TeleportConfig) -> bool:
        """Whether an event can leave FSDP2's weights sharded, and needs them whole only while their modules run."""
        return False

    @staticmethod
    def copies(config: TeleportConfig) -> int:
        """How many times the size of the trained weights an event holds at once, gradients and copies to return to included."""
        return 4

    def decomposition_seconds(self, point: Point) -> float:
        """What the decompositions of an event will take, about, judged from a surveyed batch; 0 where they are cheap."""
        return 0.0

    def evaluate(self, batch: Any, seed: int) -> Point:
        """Loss and gradients on a batch at the current weights."""
        return evaluate(self.model, self.loss_fn, batch, seed=seed, ranks=self.ranks)

    def evaluate_again(self, point: Point) -> Point:
        """The same after a move: loss and gradients on the point's batch where the weights are now."""
        return self.evaluate(point.batch, point.seed)

    def distrust(self) -> None:
        """A trusted move has changed a loss: from now on `evaluate_again` looks."""
        self.trusting = False

    @property
    @abstractmethod
    def movable(self) -> list[nn.Parameter]:
        """The parameters that this method may change; known after the first `survey`."""

    def in_order(self) -> list[nn.Parameter]:
        """What is movable, in the model's order, which is the same in all processes."""
        movable = set(self.movable)
        return [parameter for parameter in self.model.parameters() if parameter in movable]

    @property
    def written(self) -> list[Tensor]:
        """All that an event may have changed and every process has a copy of, in the same order in all processes."""
        return [] if self.ranks.shards is not None else [parameter.data for parameter in self.in_order()]

    @property
    def blocking(self) -> list[nn.Parameter]:
        """Parameters that must not be trained before the event if it is to move all that it could now."""
        return []

    @abstractmethod
    def survey(self, point: Point) -> None:
        """See one teleport batch before anything moves; called for each in turn."""

    def fit(self) -> None:  # noqa: B027  (a method need not)
        """All batches are surveyed: prepare what holds for the whole event."""

    def begin(self, batch: Any, seed: int) -> Point:
        """A batch's turn has come: evaluate it, and prepare what holds for its steps."""
        return self.evaluate(batch, seed)

    def snapshot(self) -> Snapshot:
        """A copy of all that this method may change."""
        return Snapshot(self.movable)

    def gains(self, reached: Point, fraction: float) -> bool:
        """Whether the move that was just made, this fraction of what was proposed, is worth keeping; if not, it is halved."""
        return True

    def randomise(self, snapshot: Snapshot) -> None:
        """Put a random move of the same length in the place of the event's, as a control."""
        raise NotImplementedError(f"{type(self).__name__} has no random move; use control=None, or method='null_space'")

    def review(self, point: Point) -> None:  # noqa: B027  (a method need not)
        """See one teleport batch after the last move; called for each in turn."""

    def accept(self) -> None:  # noqa: B027  (a method need not)
        """The event will not be undone."""

    @abstractmethod
    def propose(self, point: Point | None = None) -> Move | None:
        """The next move. None: nowhere to go.

        Args:
            point: where the batch stands whose turn it is; None for a method that moves once.
        """
