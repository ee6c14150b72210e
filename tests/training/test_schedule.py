import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from hf_teleport import TeleportConfig
from hf_teleport.training.schedule import doubling, teleport_steps, upcoming_rates


def test_first_epochs_and_listed_epochs():
    assert teleport_steps(TeleportConfig(epochs=2), 10, 50) == {0: 0, 10: 1}
    assert teleport_steps(TeleportConfig(epochs=[4, 1]), 10, 50) == {10: 1, 40: 4}


def test_never():
    assert teleport_steps(TeleportConfig(epochs=0), 10, 50) == {}
    assert teleport_steps(TeleportConfig(epochs=[]), 10, 50) == {}


def test_warmup_delays_inside_an_epoch_and_drops_epochs_before_it():
    assert teleport_steps(TeleportConfig(epochs=[0, 2], warmup_steps=4), 10, 50) == {4: 0, 20: 2}
    assert teleport_steps(TeleportConfig(epochs=[0, 2], warmup_steps=12), 10, 50) == {20: 2}


def test_more_first_epochs_than_there_are_warns_and_takes_all():
    with pytest.warns(UserWarning, match="more than the 2 epochs"):
        assert teleport_steps(TeleportConfig(epochs=5), 10, 15) == {0: 0, 10: 1}


def test_epoch_beyond_the_end_is_an_error():
    with pytest.raises(ValueError, match=r"\[5\] lie beyond the run, which has 5 epochs"):
        teleport_steps(TeleportConfig(epochs=[0, 5]), 10, 50)


def test_warmup_beyond_every_scheduled_epoch_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps = 40 outlasts"):
        teleport_steps(TeleportConfig(epochs=[0, 1], warmup_steps=40), 10, 50)


def test_listed_steps_replace_epochs():
    assert teleport_steps(TeleportConfig(epochs=2, steps=[3, 25]), 10, 50) == {3: 0, 25: 2}
    assert teleport_steps(TeleportConfig(epochs=2, steps=[]), 10, 50) == {}


def test_every_so_many_steps_from_the_first_on():
    assert teleport_steps(TeleportConfig(steps=[5], every_steps=20), 10, 50) == {5: 0, 25: 2, 45: 4}
    assert teleport_steps(TeleportConfig(epochs=[1], every_steps=15), 10, 50) == {10: 1, 25: 2, 40: 4}
    assert teleport_steps(TeleportConfig(epochs=0, every_steps=15), 10, 50) == {}


def test_a_step_beyond_the_end_is_an_error():
    with pytest.raises(ValueError, match=r"\[50\] lie beyond the run, which has 50 optimizer steps"):
        teleport_steps(TeleportConfig(steps=[5, 50]), 10, 50)


@given(
    steps_per_epoch=st.integers(1, 20),
    num_epochs=st.integers(1, 10),
    warmup=st.integers(0, 10),
    data=st.data(),
)
def test_each_event_lies_in_its_epoch_after_the_warmup(steps_per_epoch, num_epochs, warmup, data):
    last = data.draw(st.integers(-(-(warmup + 1) // steps_per_epoch), num_epochs + 20))
    max_steps = (last + 1) * steps_per_epoch
    epochs = [*data.draw(st.lists(st.integers(0, last), max_size=4)), last]
    for step, epoch in teleport_steps(TeleportConfig(epochs=epochs, warmup_steps=warmup), steps_per_epoch, max_steps).items():
        assert step // steps_per_epoch == epoch
        assert epoch in epochs
        assert warmup <= step < max_steps


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_upcoming_rates_are_those_that_come(name):
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.3}])
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=12)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    told = upcoming_rates(scheduler)
    for i in range(8):
        assert told(i) == pytest.approx([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()


def test_a_scheduler_that_cannot_say_beforehand():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert upcoming_rates(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)) is None
    assert upcoming_rates(None) is None


def test_a_basis_is_turned_before_steps_that_double_up_to_half_of_the_run():
    assert doubling(0, 900, 300) == [10, 20, 40, 80]
    assert doubling(0, 900, 1000) == [10, 20, 40, 80, 160, 320]
    for config in (TeleportConfig(method="basis"), TeleportConfig(method="basis", steps="doubling")):
        assert teleport_steps(config, 50, 100) == {10: 0, 20: 0, 40: 0}
    assert teleport_steps(TeleportConfig(method="null_space", steps="doubling"), 50, 100) == {10: 0, 20: 0, 40: 0}
    both = TeleportConfig(method="basis", steps="doubling", every_steps=30)
    assert teleport_steps(both, 50, 100) == {10: 0, 20: 0, 40: 0, 70: 1}


def test_times_of_ones_own_stand():
    assert teleport_steps(TeleportConfig(method="basis", epochs=[0]), 50, 100) == {0: 0}
    assert teleport_steps(TeleportConfig(method="basis", steps=[3]), 50, 100) == {3: 0}
    assert teleport_steps(TeleportConfig(method="null_space"), 50, 100) == {0: 0}


def test_doubling_begins_after_the_warm_up_and_early_in_a_short_run():
    assert doubling(30, 900, 300) == [30, 60, 120]
    assert doubling(0, 6, 300) == [3, 6, 12, 24, 48, 96]
    assert doubling(0, 900, 12) == [6]
    assert doubling(0, 1, 1) == [0]
    with pytest.raises(ValueError, match="lie beyond the run"):
        doubling(400, 900, 300)


@given(warmup=st.integers(0, 50), per_epoch=st.integers(1, 500), steps=st.integers(51, 5000))
def test_doubled_steps_double_and_leave_half_of_the_run(warmup, per_epoch, steps):
    found = doubling(warmup, per_epoch, steps)
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(found))
    assert all(step <= steps // 2 for step in found[1:])
    assert found[0] in (warmup, 10, per_epoch // 2, steps // 2)
