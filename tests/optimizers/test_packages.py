"""The optimizers of the packages that people train with: turned, or refused before training; never turned wrongly."""

from functools import cache

import pytest
import torch
from optimizer_catalogue import by_name, made
from optimizers import agreement, least, llama
from torch import nn

from hf_teleport.optimizers.leaves import leaves
from hf_teleport.optimizers.state import check_optimizer, forget

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # GaLore's

CATALOGUE = made()

# What must be turned; all others may be refused too (docs/optimizers.md).
TURNED = [
    ("torch", "AdamW"),
    ("torch", "Adafactor"),
    ("torch", "Muon + AdamW"),
    ("torchao", "AdamW8bit"),
    ("torchao", "AdamW4bit"),
    ("bitsandbytes", "AdamW8bit"),
    ("bitsandbytes", "AdEMAMix8bit"),
    ("bitsandbytes", "Lion8bit"),
    ("galore-torch", "GaLoreAdamW"),
    ("galore-torch", "GaLoreAdafactor"),
    ("apollo-torch", "APOLLOAdamW, random"),
    ("apollo-torch", "APOLLOAdamW, svd"),
    ("Trainer", "galore_adamw_layerwise"),
    ("Trainer", "apollo_adamw_layerwise"),
    ("pytorch_optimizer", "CAME"),
    ("pytorch_optimizer", "AdEMAMix"),
]
REFUSED = [
    ("pytorch_optimizer", "Prodigy"),
    ("pytorch_optimizer", "Nero"),
    ("pytorch_optimizer", "FlashAdamW"),
    ("schedulefree", "AdamWScheduleFree"),
    ("schedulefree", "RAdamScheduleFree"),
]


@pytest.mark.parametrize("which", TURNED, ids=lambda which: which[1])
def test_the_next_update_is_the_turned_one(which):
    model = llama()
    cosine, _ = agreement(model, (by_name(which[1]) if which[0] == "Trainer" else CATALOGUE[which])(model))
    assert cosine > least(which[1])


@pytest.mark.parametrize("which", REFUSED, ids=lambda which: which[1])
def test_what_cannot_be_turned_is_refused_with_a_way_out(which):
    with pytest.raises(ValueError, match=r"AdamW|reset"):
        check_optimizer(CATALOGUE[which](llama()))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)


def stepped(model, optimizer, seeds):
    updates = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(seed)
        optimizer.step()
        updates += [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    return updates


@cache
def accepted(which):
    """An optimizer of a small model, or None if it does not run, or is refused. Found once for all tests."""
    model = Two()
    try:
        optimizer = CATALOGUE[which](model)
        check_optimizer(optimizer, reset=True)
    except Exception:  # packages raise what they like where theirs does not run
        return None
    return model, optimizer


# APOLLO draws for each parameter by its place among all.
OF_TORCH_AND_MORE = [which for which in CATALOGUE if which[0] in ("torch", "pytorch_optimizer", "apollo-torch")]


@pytest.mark.parametrize("which", OF_TORCH_AND_MORE, ids=lambda which: which[1])
def test_a_reset_is_a_new_optimizer(which):
    torch.manual_seed(0)
    found = accepted(which)
    if found is None:
        pytest.skip("refused")
    model, optimizer = found
    stepped(model, optimizer, range(5))
    other = Two()
    other.load_state_dict(model.state_dict())
    forget(optimizer, model.parameters())
    new = CATALOGUE[which](other)
    for found, expected in zip(stepped(model, optimizer, range(5, 8)), stepped(other, new, range(5, 8)), strict=True):
        assert torch.equal(found, expected)


def test_most_optimizers_can_be_reset():
    assert sum(accepted(which) is not None for which in OF_TORCH_AND_MORE) > 50


@pytest.mark.parametrize(
    ("package", "name"), [("bitsandbytes", "AdamW8bit"), ("bitsandbytes", "AdEMAMix8bit"), ("torchao", "AdamW8bit")]
)
def test_codes_are_read_and_written(package, name):
    model = nn.Linear(64, 80, bias=False)
    optimizer = CATALOGUE[package, name](model)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            model.weight.grad = torch.randn(80, 64)
            optimizer.step()
    for leaf in leaves(optimizer.state[model.weight]).values():
        before = leaf.read().clone()
        assert before.any()
        leaf.write(before)
        # The largest of a block may have a code just below one, which is the block's scale then.
        assert (leaf.read() - before).norm() < 0.01 * before.norm()
        leaf.write(-2 * before if before.min() < 0 else 2 * before)
        assert (leaf.read().abs() - 2 * before.abs()).norm() < 0.02 * before.norm()
