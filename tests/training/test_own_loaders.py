"""Teleport batches are of what training loads, if the user has a loader or a sampler of their own."""

from functools import partial

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, WeightedRandomSampler

from drawn_runs import assert_as_without, own_loader, rows_of, run
from tiny_runs import Stream, Texts, assert_moved, pad


def shuffled(rows=None, **settings):
    generator = torch.Generator().manual_seed(5)
    return DataLoader(rows or Texts(), batch_size=4, shuffle=True, collate_fn=pad, generator=generator, **settings)


class Pairs(Sampler):
    """A sampler of batches: rows whose numbers follow each other."""

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 16, 2)])

    def __len__(self):
        return 8


class PairsOfTorch(BatchSampler):
    def __init__(self):
        super().__init__(range(16), 2, False)

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 16, 2)])


class Whole(Dataset):
    """Rows that are batches."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return pad([Texts().rows[index]] * 2)


LOADERS = {
    "shuffled": shuffled,
    "in_order": lambda: DataLoader(Texts(), batch_size=4, collate_fn=pad),
    "weighted": lambda: DataLoader(Texts(), 4, sampler=WeightedRandomSampler([1.0] * 9 + [0.0] * 9, 18), collate_fn=pad),
    "batches": lambda: DataLoader(Texts(), batch_sampler=Pairs(), collate_fn=pad),
    "batches_of_torch": lambda: DataLoader(Texts(), batch_sampler=PairsOfTorch(), collate_fn=pad),
    "rows_are_batches": lambda: DataLoader(Whole(), batch_size=None),
    "stream": lambda: DataLoader(Stream(), batch_size=4, collate_fn=pad),
    "list_of_batches": lambda: [pad(Texts().rows[i : i + 4]) for i in range(0, 16, 4)],
    "workers": lambda: shuffled(num_workers=1),
}


@pytest.mark.parametrize("data", [None, "raw"])
@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_batches_of_a_loader_of_ones_own(tmp_path, make_loader, data):
    """Training and teleports alike go without the data set that the trainer was given, or has not."""
    raw = None if data is None else [{"text": f"line {i}"} for i in range(18)]
    mixin = own_loader(make_loader)
    trainer = assert_as_without(tmp_path, mixin, lambda: {"train_dataset": raw, "data_collator": None})
    assert type(trainer).calls == 1, "that of training is used"
    known = [row["input_ids"].tolist() for row in Texts().rows]
    for row in rows_of(trainer.drawn[-1]):
        assert [token for token in row if token] in known


def test_a_loader_that_is_the_same_object_each_time_and_has_a_generator(tmp_path):
    def mixin():
        loader = shuffled()
        return own_loader(lambda: loader)

    plain, trainer = run(tmp_path, mixin(), off=True), run(tmp_path, mixin())
    assert trainer.seen == plain.seen
    assert_moved(trainer)
    first = trainer.teleport()
    again = trainer.teleport()
    assert first.loss_after == pytest.approx(again.loss_before, rel=1e-6), "by hand the same batches are drawn again"


def test_rows_that_a_batch_sampler_puts_together_stay_together(tmp_path):
    trainer = run(tmp_path, own_loader(LOADERS["batches"]), config={"batch_size": None})
    rows = [row["input_ids"].tolist() for row in Texts().rows]
    for batch in trainer.drawn[-1].batches:
        first, second = (rows.index([token for token in row if token]) for row in batch["input_ids"].tolist())
        assert (first % 2, second) == (0, first + 1)


def test_the_size_of_a_loaders_batches_is_that_of_teleport_batches_unless_it_is_set(tmp_path):
    for size, expected in ((None, 4), (3, 3)):
        trainer = run(tmp_path, own_loader(shuffled), config={"batch_size": size}, per_device_train_batch_size=2)
        assert [len(batch["input_ids"]) for batch in trainer.drawn[-1].batches] == [expected, expected]


def test_a_teleport_dataset_beside_a_loader_of_ones_own(tmp_path):
    few = Texts(5, seed=9)
    trainer = run(tmp_path, own_loader(shuffled), {"teleport_dataset": few})
    known = [row["input_ids"].tolist() for row in few.rows]
    assert all([token for token in row if token] in known for row in rows_of(trainer.drawn[-1]))


class ByName(Dataset):
    """Rows with names for keys."""

    def __init__(self):
        self.rows = {f"row {i}": row for i, row in enumerate(Texts().rows)}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, name):
        return self.rows[name]


class Names(Sampler):
    def __init__(self, generator=None, endless=False):
        self.generator, self.endless = generator, endless

    def __iter__(self):
        while True:
            for i in torch.randperm(9, generator=self.generator).tolist():  # the first half only
                yield f"row {i}"
            if not self.endless:
                return


class NamesWithLength(Names):
    def __len__(self):
        return 9


@pytest.mark.parametrize("sampler", [Names, NamesWithLength, partial(Names, torch.Generator().manual_seed(2))])
def test_a_sampler_of_ones_own_says_which_rows_there_are(tmp_path, sampler):
    class OwnSampler:
        def _get_train_sampler(self, *args):
            return sampler()

    generator = sampler.args[0] if isinstance(sampler, partial) else torch.Generator()
    start = generator.get_state()
    plain = run(tmp_path, OwnSampler, {"train_dataset": ByName()}, off=True)
    generator.set_state(start)
    trainer = run(tmp_path, OwnSampler, {"train_dataset": ByName()})
    assert trainer.seen == plain.seen
    assert_moved(trainer)
    known = [row["input_ids"].tolist() for row in Texts().rows[:9]]
    assert all([token for token in row if token] in known for row in rows_of(trainer.drawn[-1]))


def test_a_sampler_without_an_end(tmp_path):
    class OwnSampler:
        def _get_train_sampler(self, *args):
            return Names(endless=True)

    assert_moved(run(tmp_path, OwnSampler, {"train_dataset": ByName()}))


def test_each_event_draws_from_a_sampler_anew(tmp_path):
    class OwnSampler:
        def _get_train_sampler(self, *args):
            return NamesWithLength()

    trainer = run(tmp_path, OwnSampler, {"train_dataset": ByName()})
    first, same, other = (rows_of(trainer._draw(2, event)) for event in (1, 1, 2))
    assert first == same != other
