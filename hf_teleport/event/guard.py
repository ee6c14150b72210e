"""The limits of an event: how far the loss may change, and how far the gradient may grow."""

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.point import Point

# A step may exceed `max_growth` by this factor. A step that jumps further is too long to trust.
_OVERSHOOT = 1.1


class Guard:
    """Judges the points of an event by the limits in the settings."""

    def __init__(self, config: TeleportConfig):
        self._config = config

    def objection(self, point: Point, loss: float, grad_norm: float) -> str:
        """Why the weights must not stay at a point. Empty: they may.

        Args:
            loss, grad_norm: of the point's batch before the event.
        """
        growth = self._config.max_growth
        if not point.finite:
            return "non_finite"
        if not self._config.allows(point.loss, loss):
            return "max_loss_change"
        if growth is not None and point.grad_norm > _OVERSHOOT * growth * grad_norm:
            return "max_growth"
        return ""

    def limit(self, point: Point, grad_norm: float) -> str:
        """Why no further step is made on a batch. Empty: go on.

        Args:
            grad_norm: of the point's batch before the event.
        """
        cap, growth = self._config.grad_norm_cap, self._config.max_growth
        if cap is not None and point.grad_norm >= cap:
            return "grad_norm_cap"
        if growth is not None and point.grad_norm >= growth * grad_norm:
            return "max_growth"
        return ""
