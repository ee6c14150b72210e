"""Killed at any moment, a run that is started again ends as the one that was never interrupted."""

import signal

import pytest
import torch

import forks
import killable


def run(*args, **kwargs):
    """`killable.train` in a process of its own. Returns its exit code."""
    forks.start()
    process = forks.context.Process(target=killable.train, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def found(folder):
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run ends with."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    ends = found(folder)
    events = [entry for entry in ends["history"] if "teleport/steps" in entry]
    assert [(e["step"], e["teleport/method"]) for e in events] == [(s, m) for s in (3, 6) for m in ("null_space", "basis")]
    assert all(e["teleport/steps"] > 0 and not e["teleport/rolled_back"] for e in events)
    return ends


def assert_killed(folder, kill, **settings):
    assert run(folder, kill, **settings) == -signal.SIGKILL
    assert not (folder / "found.pt").exists()


def assert_ends_alike(folder, whole, start, **settings):
    """Started again, it goes on from this step and ends as the whole run, its log included."""
    assert run(folder, **settings) == 0
    ends = found(folder)
    assert ends["from"] == start
    assert ends["events"] == 2 * sum(step >= start for step in killable.EVENTS)
    for kept in ("weights", "optimizer"):
        assert len(ends[kept]) == len(whole[kept])
        assert all(torch.equal(a, b) for a, b in zip(ends[kept], whole[kept], strict=True)), kept
    assert ends["history"] == whole["history"]
    return ends


@pytest.mark.parametrize(("phase", "step"), [(phase, killable.EVENTS[i % 2]) for i, phase in enumerate(killable.PHASES)])
def test_killed_in_a_teleport(tmp_path, whole, phase, step):
    assert_killed(tmp_path, ("event", step, phase))
    assert_ends_alike(tmp_path, whole, start=2 if step == 3 else 6)


@pytest.mark.parametrize(
    ("kill", "start"),
    [
        (("step", 1), 0),  # before the first checkpoint
        (("saved", 2), 2),  # in the middle of an epoch, before its event
        (("saved", 4), 4),  # in the middle of an epoch, after its event
        (("step", 5), 4),  # between two events
        (("saved", 6), 6),  # right before an event
        (("step", 7), 6),  # after an event of which no checkpoint knows
        (("saved", 8), 8),  # after the last event
        (("saved", 12), 12),  # after the last step
    ],
)
def test_killed_between_teleports(tmp_path, whole, kill, start):
    assert_killed(tmp_path, kill)
    assert_ends_alike(tmp_path, whole, start)


@pytest.mark.parametrize(("writer", "step"), [("weights", 4), ("optimizer", 6), ("state", 8)])
def test_killed_while_a_checkpoint_is_written(tmp_path, whole, writer, step):
    assert_killed(tmp_path, ("saving", step, writer))
    assert_ends_alike(tmp_path, whole, start=step - 2)


def test_killed_again_and_again(tmp_path, whole):
    for kill in (
        ("event", 3, "half_a_step"),
        ("event", 3, "half_a_turn"),
        ("saving", 4, "state"),
        ("event", 6, "weights_shifted"),
    ):
        assert_killed(tmp_path, kill)
    assert_ends_alike(tmp_path, whole, start=6)


@pytest.mark.parametrize(("kill", "start"), [(("event", 3, "half_a_turn"), 2), (("step", 5), 4), (("event", 6, "logged"), 6)])
def test_with_the_states_of_callbacks_from_the_checkpoint(tmp_path, whole, kill, start):
    settings = {"restore_callback_states_from_checkpoint": True}
    assert_killed(tmp_path, kill, **settings)
    ends = assert_ends_alike(tmp_path, whole, start, **settings)
    assert ends["counted"] == killable.STEPS
