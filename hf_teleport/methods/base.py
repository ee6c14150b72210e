"""The interface of a method. An event knows no more of it than its family: a method climbs on each batch, or it turns once."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.point import LossFn, Point, evaluate, evaluate_again
from hf_teleport.optimizers.rehearsal import Rehearsal
from hf_teleport.report import LayerReport, SymmetryReport
from hf_teleport.weights.snapshot import Snapshot
from hf_teleport.weights.whole import WHOLE, Weights


class Method(ABC):
    """The base class of both families. Each event makes a new method, calls `survey` for each batch, and then `fit`.

    Before that, `passes`, `copies`, `event_bytes`, `on_shards` and the methods with `seconds` say what the event will take.

    Args:
        optimizer: the one that trains the model, for methods that change what it remembers.
        weights: those of the model, and the processes that each have a share of every batch.

    Attributes:
        at_rest: why a weight that may move does not, though the event makes a step.
        rehearsal: the optimizer's next steps, set before `survey` for objectives that are about them.
        reports: one for each parameter, filled by `survey`, `fit` and what follows.
    """

    at_rest: ClassVar[str]

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, config: TeleportConfig, optimizer: Any = None, weights: Weights = WHOLE
    ):
        self.model = model
        self.loss_fn = loss_fn
        self.config = config
        self.optimizer = optimizer
        self.weights = weights
        self.ranks = weights.ranks
        self.rehearsal: Rehearsal | None = None
        self.reports: dict[nn.Parameter, LayerReport] = {}

    @staticmethod
    @abstractmethod
    def passes(config: TeleportConfig) -> int:
        """Upper limit of forward and backward passes over a batch in one event. Decompositions do not count."""

    @staticmethod
    def copies(config: TeleportConfig) -> int:
        """Peak memory of an event, in multiples of the trained weights' size. Includes gradients and copies to restore."""
        return 4

    @staticmethod
    def on_shards(config: TeleportConfig) -> bool:
        """Whether an event can leave FSDP2's weights sharded, and needs them whole only while their modules run."""
        return False

    def decomposition_seconds(self, point: Point) -> float:
        """What the decompositions of an event will take, about, judged from a surveyed batch; 0 where they are cheap."""
        return 0.0

    def event_bytes(self) -> int:
        """What an event holds at once beside the weights, the optimizer's state and a batch's activations, at most."""
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return self.copies(self.config) * trained

    def evaluate(self, batch: Any, seed: int) -> Point:
        """Loss and gradients on a batch at the current weights."""
        return evaluate(self.model, self.loss_fn, batch, seed=seed, weights=self.weights)

    @abstractmethod
    def survey(self, point: Point) -> None:
        """See one teleport batch before anything moves; called for each in turn."""

    def fit(self) -> None:  # noqa: B027  (a method need not)
        """All batches are surveyed: prepare what holds for the whole event."""

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
        return [parameter.data for parameter in self.in_order()] if self.weights.whole else []

    def snapshot(self) -> Snapshot:
        """A copy of all that this method may change."""
        return Snapshot(self.movable)

    def undone_on_error(self) -> AbstractContextManager[None]:
        """A context to keep the event in. An error in it takes back what the method keeps for later events; not the weights."""
        return nullcontext()


class Move:
    """A step that was proposed: made from where the weights stand, and then made shorter or taken back.

    Args:
        carry_out: `carry_out(1.0)` makes it in full, `carry_out(0.5)` by half.
        snapshot: makes a copy of all that it may change.
        straight: half of it is half the way that the weights have gone. What it is made of is let go then once it is made.
        gains: `gains(reached, fraction)` says whether the move, made by this fraction, is worth keeping; if not, it is halved.
    """

    def __init__(
        self,
        carry_out: Callable[[float], None],
        snapshot: Callable[[], Snapshot],
        straight: bool = False,
        gains: Callable[[Point, float], bool] = lambda reached, fraction: True,
    ):
        self._carry_out: Callable[[float], None] | None = carry_out
        self._snapshot = snapshot
        self._straight = straight
        self._gains = gains
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
        """Halve the length of the move."""
        self.fraction /= 2
        if self._straight:
            self._copy.halve()
        else:
            self._copy.restore()
            self(self.fraction)

    def undo(self) -> None:
        """The weights are bit for bit what they were."""
        self._copy.restore()

    def gains(self, reached: Point) -> bool:
        """Whether it is worth keeping as it was made, by where it has led."""
        return self._gains(reached, self.fraction)


class ClimbingMethod(Method):
    """A method that climbs on each batch in turn, step by step: after `fit` the event calls (begin, propose*) for each batch.

    If a point keeps its graph (`evaluate(..., keep_graph=True)`), the steps on its batch should not change activations or loss.
    Then a backward is enough after each step, and the event checks the loss after the last one. If the loss has changed, the
    event calls `distrust` and starts again.
    """

    at_rest = (
        "its direction is zero, or no more than rounding beside the others': no trainable weight lies below it, no gradient "
        "reaches its output, or other layers are far more sensitive"
    )

    def begin(self, batch: Any, seed: int) -> Point:
        """A batch's turn has come: evaluate it, and prepare what holds for its steps."""
        return self.evaluate(batch, seed)

    @abstractmethod
    def propose(self, point: Point) -> Move | None:
        """The next move from a point of the batch whose turn it is. None: nowhere to go."""

    def evaluate_again(self, point: Point) -> Point:
        """Loss and gradients on the point's batch where the weights are now."""
        return self.evaluate(point.batch, point.seed) if point.graph is None else evaluate_again(point, self.ranks)

    def distrust(self) -> None:
        """A loss has moved that the points took to be the same: keep no more graphs in this event."""

    def finish(self, snapshot: Snapshot) -> None:
        """The last step on the last batch is made.

        Args:
            snapshot: of the weights before the event.
        """


class TurningMethod(Method):
    """A method that makes a single move, exact for every input: after `fit` the event calls carry_out, review*, and accept.

    What is known of the batches is gathered in `survey`, what to turn is chosen in `fit`, and the weights change in `carry_out`
    alone.

    Attributes:
        symmetries: what was found, and whether it turns.
        objection: why the event must be undone, even if its loss stayed. Set by `review`.
    """

    at_rest = "the turn leaves its values as they are, as it does a uniform gain and a bias of zeros"

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.symmetries: list[SymmetryReport] = []
        self.objection = ""

    @property
    def blocking(self) -> list[nn.Parameter]:
        """Parameters that must not be trained before the event if it is to move all that it could now."""
        return []

    @property
    def aligned(self) -> bool:
        """Whether what was chosen is too near to what there is to be worth an event."""
        return False

    def turn_seconds(self, point: Point) -> float:
        """What the turn of weights, optimizer's state and gradients will take, about, judged from a surveyed batch."""
        return 0.0

    def look_seconds(self, point: Point) -> float:
        """Estimated seconds to read the gradients of one training step, measured on the gradients of a surveyed batch."""
        return 0.0

    @abstractmethod
    def carry_out(self) -> None:
        """Change the weights, and what the optimizer remembers of them."""

    def review(self, point: Point) -> None:
        """See one teleport batch after the move; called for each in turn."""

    def accept(self) -> None:
        """The event is kept: learn of it. An error undoes it."""
