"""What a user may choose is what there is: the settings' choices against the registries."""

from typing import get_args, get_type_hints

from hf_teleport import TeleportConfig
from hf_teleport.commands import inspect
from hf_teleport.methods import METHODS
from hf_teleport.methods.null_space.objectives import OBJECTIVES

HINTS = get_type_hints(TeleportConfig)


def test_methods():
    single = [name for name in get_args(HINTS["method"]) if "+" not in name]
    assert sorted(single) == sorted(["auto", *METHODS])
    assert sorted(inspect.METHODS) == sorted(METHODS)
    for method in METHODS.values():
        assert (method.__doc__ or "").partition("\n\n")[0].endswith("."), "what model cards say of it"


def test_objectives():
    assert sorted(get_args(HINTS["objective"])) == sorted(OBJECTIVES)
