"""The way home: undo all changes of basis since a run began, in the weights, in averages and in the optimizer's state."""

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.roles import names_of_parameters
from hf_teleport.methods.basis.tracker import Tracker
from hf_teleport.optimizers.state import OptimizerState, forget
from hf_teleport.report import SymmetryReport
from hf_teleport.weights.isolation import isolated
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.snapshot import Snapshot


def turn_back(
    model: nn.Module,
    config: TeleportConfig,
    tracker: Tracker,
    optimizer: Any,
    states: MutableMapping[Any, Any],
    ranks: Ranks,
) -> list[SymmetryReport]:
    """Turn the weights back. What can't be turned back stays turned.

    If an error occurs, all weights are bit for bit what they were.

    Args:
        tracker: has the changes of basis to undo. The second moments that it gathered turn too.
        states: the optimizer's state of each parameter.

    Returns:
        The symmetries that had been turned. A symmetry that stays turned has a reason.
    """
    way = tracker.way
    way.frozen.release()
    if not way:
        way.frozen.restore()
        return []
    with isolated(model, states, ranks, on_shards=True) as weights:
        state = None
        if optimizer is not None and config.optimizer_state == "keep":
            state = OptimizerState(optimizer, "keep" if config.second_moment == "keep" else "turn")
        objection = (lambda parameter: "") if state is None else state.objection
        staying = ranks.together(lambda: way.staying(names_of_parameters(model), objection, tracker.averages, weights))
        turned = [weights.stand_in(parameter) for parameter in way.parameters]
        snapshot = Snapshot(turned, None if state is None else state.state)
        moments = tracker.moments_back(staying)
        reports = [leg.report(staying.get(leg, "")) for leg in way.legs]
        going = [leg.symmetry for leg in way.legs if leg not in staying]
        # Frozen weights are restored from their copies, so only the others are turned.
        only = set(way.parameters) - set(way.frozen.originals) if way.frozen.originals else None
        try:
            with ExitStack() as stack:
                ranks.together(lambda: stack.enter_context(tracker.undone_on_error(going)))
                ranks.together(lambda: way.turn_back(staying, state, only=only, weights=weights))
                ranks.together(lambda: [way.turn_back(staying, None, average) for average in tracker.averages])
                if weights.whole:
                    kept = [] if state is None else [tensor for parameter in turned for tensor in state.tensors(parameter)]
                    ranks.broadcast([parameter.data for parameter in turned] + kept)
                # Last, for it is not undone.
                if optimizer is not None and config.optimizer_state == "reset":
                    forget(optimizer, turned, weights.origin)
        except BaseException:
            snapshot.restore()
            raise
    tracker.turned(moments)
    way.forget(staying)
    with torch.no_grad():
        for parameter, values in way.turned_frozen().items():
            parameter.copy_(values)
    return reports
