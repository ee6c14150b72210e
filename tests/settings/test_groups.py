"""Which methods read a setting: what is declared is what an event really reads."""

import sys
from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from torch import nn

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods import METHODS
from hf_teleport.settings.groups import READ_BY, CommonSettings, readers, reads

from tiny_models import build, loss_fn

NAMES = [setting.name for setting in fields(TeleportConfig)]


class Watched(TeleportConfig):
    """Settings that know which of them the package has read, but for copies that `replace` makes."""

    seen: ClassVar = set()

    def __getattribute__(self, name):
        module = sys._getframe(1).f_globals["__name__"]
        if module.startswith("hf_teleport.") and module != "hf_teleport.config":
            Watched.seen.add(name)
        return super().__getattribute__(name)


def network():
    """An MLP that method 'symmetry' takes."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 6, generator=generator).double(), torch.arange(4) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 3)).double()
    return model, batch, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("method", METHODS)
def test_an_event_reads_what_is_declared_and_nothing_else(method):
    torch.manual_seed(0)
    model, batch, loss = network() if method == "symmetry" else (*build("llama"), loss_fn)
    Watched.seen = set()
    teleporter = Teleporter(model, Watched(method=method), optimizer=torch.optim.AdamW(model.parameters()))
    teleporter.check(batch, loss)
    report = teleporter.teleport([batch, batch], loss)
    assert report.steps
    common = {setting.name for setting in fields(CommonSettings)}
    # The teleporter looks at `control` whatever the method is, and TeleportConfig refuses it for all but one.
    # `turn_back` is about the end of a run.
    others = {"control", "turn_back"}
    own = Watched.seen.intersection(NAMES) - common - others
    assert own == {name for name in NAMES if method in readers(name)} - others


def test_every_setting_is_in_one_group():
    grouped = [setting.name for group in (CommonSettings, *READ_BY) for setting in fields(group)]
    assert sorted(grouped) == sorted(NAMES)
    assert {method for methods in READ_BY.values() for method in methods} == {*METHODS, "auto"}


def test_a_combination_and_auto_read_what_their_parts_read():
    both = {name for name in NAMES if reads("null_space", name) or reads("basis", name)}
    assert {name for name in NAMES if reads("null_space+basis", name)} == both
    assert {name for name in NAMES if reads("auto", name)} == both | {"budget"}
