"""Drawing the batches of an event leaves data, collators and random generators as they were, whatever they are."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from hf_teleport.weights.isolation import own_copy, preserved_generators

from drawn_runs import assert_as_without
from tiny_runs import Texts, make, pad


class Delegating:
    """Asks what it wraps for all that it has not itself, before it has anything to ask."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, index):
        return self.inner[index]

    def __len__(self):
        return len(self.inner)

    def __call__(self, rows):
        return self.inner(rows)


class Uncopied(Texts):
    def __getstate__(self):
        raise TypeError("this data set has an open file")


class Slotted:
    __slots__ = ("count", "inner")

    def __init__(self, inner):
        self.inner, self.count = inner, 0

    def __call__(self, rows):
        self.count += 1
        return self.inner(rows)


class Guarded(Texts):
    def __copy__(self):
        raise RuntimeError("make a new one instead")


@pytest.mark.parametrize(
    "made",
    [
        lambda: {"train_dataset": Delegating(Texts())},
        lambda: {"data_collator": Delegating(pad)},
        lambda: {"train_dataset": Uncopied()},
        lambda: {"train_dataset": Guarded()},
        lambda: {"data_collator": Slotted(pad)},
        lambda: {"train_dataset": Texts().rows},
        lambda: {"train_dataset": tuple(Texts().rows)},
    ],
    ids=["delegating_data", "delegating_collator", "no_state", "no_copies", "slots", "list", "tuple"],
)
def test_what_cannot_be_copied_is_used_as_it_is(tmp_path, made):
    assert_as_without(tmp_path, made=made)


def test_a_copy_where_there_can_be_one():
    rows = Texts()
    assert own_copy(rows) is not rows
    assert own_copy(guarded := Guarded()) is guarded


class Noise:
    def __init__(self, generator, draw):
        self.generator, self.draw = generator, draw

    def __call__(self):
        return self.draw(self.generator)


class Noisy(Texts):
    """Rows whose first token is drawn at random, by a generator that a transform holds, inside a list."""

    def __init__(self, noise):
        super().__init__()
        self.transforms = [noise]

    def __getitem__(self, index):
        row = self.rows[index]
        ids = row["input_ids"].clone()
        ids[0] = 1 + int(self.transforms[0]()) % 7
        return {**row, "input_ids": ids}


GENERATORS = {
    "torch": lambda: Noise(torch.Generator().manual_seed(3), lambda g: torch.randint(100, (), generator=g)),
    "numpy": lambda: Noise(np.random.default_rng(3), lambda g: g.integers(100)),
    "numpy_of_old": lambda: Noise(np.random.RandomState(3), lambda g: g.randint(100)),
    "python": lambda: Noise(random.Random(3), lambda g: g.randrange(100)),
    "partial": lambda: partial(lambda g: g.randrange(100), random.Random(3)),
    "closure": lambda: (lambda g: lambda: g.randrange(100))(random.Random(3)),
    "method": lambda: (lambda g: partial(g.randrange, 100))(random.Random(3)),
}


@pytest.mark.parametrize("noise", GENERATORS.values(), ids=GENERATORS)
def test_generators_inside_of_data_are_where_they_were(tmp_path, noise):
    assert_as_without(tmp_path, made=lambda: {"train_dataset": Noisy(noise())})


def test_generators_are_found_in_what_holds_itself_and_in_long_lists():
    class Knot:
        pass

    knot = Knot()
    knot.self, knot.rows, knot.generator = knot, list(range(10**6)), torch.Generator().manual_seed(1)
    with preserved_generators(knot):
        first = torch.rand(3, generator=knot.generator)
    assert torch.equal(torch.rand(3, generator=knot.generator), first)


def test_batches_that_cannot_be_made_are_said_with_the_ways_out(tmp_path):
    trainer = make(tmp_path, made={"teleport_dataset": ["a line", "another"]}, max_steps=3)
    with pytest.raises(Exception, match="override get_teleport_dataloader"):
        trainer.train()
    assert trainer.state.global_step == 0
