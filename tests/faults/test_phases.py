"""A fault in each phase of an event, after the work of that phase: nothing of it stays."""

import pytest
import torch

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.event.climb import Climb
from hf_teleport.event.event import Event
from hf_teleport.layers.layer import Layer
from hf_teleport.methods import BasisTurn, NullSpace
from hf_teleport.methods.basis import bases, turn
from hf_teleport.methods.basis.way import Way
from hf_teleport.optimizers.state import OptimizerState
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.snapshot import Snapshot

from faulty import METHODS, Scene, failing, out_of_memory, raising, same

# What fails, and in which of its calls; it does its work before.
PHASES = {
    "null_space": {
        "audit": ("hf_teleport.methods.null_space.method.audit", 2),
        "survey": (NullSpace, "survey", 2),
        "decomposition": ("hf_teleport.methods.null_space.decomposition.null_space", 2),
        "fit": (NullSpace, "fit", 1),
        "first_copy": (Snapshot, "__init__", 1),
        "begin": (NullSpace, "begin", 2),
        "direction": ("hf_teleport.methods.null_space.method.fast_direction", 2),
        "propose": (NullSpace, "propose", 3),
        "copy_before_a_step": (Snapshot, "__init__", 3),
        "half_a_step": (Layer, "add_", 1),
        "half_a_later_step": (Layer, "add_", 7),
        "step_made": (Climb, "_step", 2),
        "held_back": ("hf_teleport.event.event.shorten", 1),
        "verdict": ("hf_teleport.event.event.verdict", 1),
        "keep": (Event, "_keep", 1),
        "broadcast": (Ranks, "broadcast", 1),
    },
    "basis": {
        "symmetries": ("hf_teleport.methods.basis.method.find_symmetries", 1),
        "survey": (BasisTurn, "survey", 2),
        "observe": (bases.Basis, "observe", 1),
        "choose": (BasisTurn, "_chosen", 2),
        "fit": (BasisTurn, "fit", 1),
        "copy": (Snapshot, "__init__", 1),
        "carry_out": (BasisTurn, "carry_out", 1),
        "gains_folded": (turn, "_divide", 1),
        "half_a_turn": (turn, "_turn", 3),
        "optimizer_half_turned": (OptimizerState, "turn", 2),
        "turned": (turn.Turn, "carry_out", 1),
        "held_back": ("hf_teleport.event.event.shorten", 1),
        "review": (BasisTurn, "review", 1),
        "verdict": ("hf_teleport.event.event.verdict", 1),
        "accept": (BasisTurn, "accept", 1),
        "keep": (Event, "_keep", 1),
    },
}


@pytest.mark.parametrize(("method", "phase"), [(method, phase) for method in METHODS for phase in PHASES[method]])
def test_a_fault_in_any_phase(monkeypatch, method, phase):
    scene = Scene(method)
    for error in (RuntimeError("the cable was pulled"), KeyboardInterrupt(), out_of_memory()):
        scene.remember()
        with monkeypatch.context() as patch:
            failing(patch, PHASES[method][phase], error)
            if isinstance(error, torch.OutOfMemoryError):
                assert scene.teleport().steps
                assert not scene.untouched()
                scene.assert_sound(held_back=False)
            else:
                with pytest.raises(type(error)) as raised:
                    scene.teleport()
                assert raised.value is error
                scene.assert_untouched()


@pytest.mark.parametrize("method", METHODS)
def test_a_fault_when_the_optimizers_state_has_been_reset(monkeypatch, method):
    scene = Scene(method, optimizer_state="reset")

    def keep(self, real=Event._keep):
        monkeypatch.setattr(Ranks, "broadcast", lambda *_: raising(RuntimeError("the cable was pulled"))(None))
        real(self)

    monkeypatch.setattr(Event, "_keep", keep)
    with pytest.raises(RuntimeError, match="cable"):
        scene.teleport()
    scene.assert_untouched()


@pytest.mark.parametrize(
    "phase", [(BasisTurn, "accept", 1), (Event, "_keep", 1), (Way, "turned_frozen", 1)], ids=["accept", "keep", "frozen"]
)
def test_a_fault_as_a_second_turn_is_kept_leaves_the_way_the_moments_and_the_averages_of_the_first(monkeypatch, phase):
    scene = Scene("basis")
    first = scene.state()
    teleporter = Teleporter(scene.model, scene.config, optimizer=scene.optimizer)
    average = {name: parameter.detach().clone() for name, parameter in scene.model.named_parameters()}
    teleporter.register_average(average)
    assert teleporter.teleport(scene.batches, scene.loss).steps
    teleporter.tracker.look(0)  # at gradients that are there
    assert teleporter.tracker.seen
    kept = {name: tensor.clone() for name, tensor in (*teleporter.state_dict().items(), *average.items())}
    teleporter.config = TeleportConfig(method="basis", basis="random")
    with monkeypatch.context() as patch:
        failing(patch, phase, RuntimeError("the cable was pulled"))
        with pytest.raises(RuntimeError, match="cable"):
            teleporter.teleport(scene.batches, scene.loss)
    assert same({**teleporter.state_dict(), **average}, kept)
    teleporter.turn_back()
    for name, parameter in scene.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), first[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(average[name], first[name], atol=1e-6, rtol=1e-5)
