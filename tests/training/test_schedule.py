import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from hf_teleport import TeleportConfig
from hf_teleport.training.schedule import teleport_steps, upcoming_rates


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
    with pytest.warns(UserWarning, match="it has 2"):
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
