"""Which batches an event gets, whatever a user gives a trainer, and that drawing them leaves training's data as it was."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler
from transformers import Trainer

from hf_teleport import TeleportTrainer
from hf_teleport.event.batches import num_items
from hf_teleport.training.drawing import read_once
from hf_teleport.weights.isolation import own_copy, preserved_generators

from tiny_runs import Stream, Texts, assert_moved, flat, llama, make, pad, teleports


class Recording:
    """Mixed into a trainer: the batches that it trains on, and those that events get."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def _draw(self, count, event):
        drawn = super()._draw(count, event)
        self.__dict__.setdefault("drawn", []).append(drawn)
        return drawn


def run(folder, mixin=object, made=None, config=None, off=False, **settings):
    """A trained trainer, whose class is made of some more."""
    bases = [base for base in (Recording, mixin, TeleportTrainer) if base is not object]
    config = teleports(**{"method": "null_space", "steps": [1], **(config or {}), **({"steps": []} if off else {})})
    trainer = make(folder, config=config, made=made, trainer_class=type("Tried", tuple(bases), {}), max_steps=4, **settings)
    trainer.train()
    return trainer


def assert_as_without(tmp_path, mixin=object, made=dict, events=1, config=None, **settings):
    """There was an event, and training saw what it sees without one. Returns the run.

    Args:
        made: makes what the trainer gets, anew for each run.
    """
    plain = run(tmp_path, mixin, made(), off=True, **settings)
    trainer = run(tmp_path, mixin, made(), config=config, **settings)
    assert trainer.seen == plain.seen
    if events:
        assert_moved(trainer, events)
    else:
        assert torch.equal(flat(trainer.model), flat(plain.model))
    return trainer


def rows_of(drawn):
    return [row for batch in (*drawn.batches, drawn.held_back) for row in batch["input_ids"].tolist()]


# --- Copies -----------------------------------------------------------------------------------------------------------------


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


# --- A loader or a sampler of one's own -------------------------------------------------------------------------------------


def own_loader(make_loader):
    """A mixin whose loader is made once, and a counter of the calls."""

    class OwnLoader:
        calls = 0

        def get_train_dataloader(self):
            type(self).calls += 1
            return make_loader()

    return OwnLoader


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


# --- Streams that can be read once ------------------------------------------------------------------------------------------


class Once(IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self):
        self.source = iter(Texts(40).rows)

    def __iter__(self):
        return self.source


class OnceInside(Once):
    def __iter__(self):
        yield from self.source


class Queue(IterableDataset):
    def __init__(self):
        self.rows = Texts(40).rows

    def __iter__(self):
        return self

    def __next__(self):
        if not self.rows:
            raise StopIteration
        return self.rows.pop(0)


class Around(IterableDataset):
    def __init__(self):
        self.streams = [Once()]

    def __iter__(self):
        for stream in self.streams:
            yield from stream


ONCE = {"shared": Once, "inside": OnceInside, "itself": Queue, "around": Around}


@pytest.mark.parametrize("method", ["auto", "null_space"])
@pytest.mark.parametrize("stream", ONCE.values(), ids=ONCE)
def test_from_a_stream_that_can_be_read_once_nothing_is_taken(tmp_path, caplog, stream, method):
    trainer = assert_as_without(
        tmp_path, made=lambda: {"train_dataset": stream()}, events=0, config={"steps": None, "method": method}
    )
    assert "can be read only once" in caplog.text
    assert "teleport_dataset" in caplog.text
    with pytest.raises(ValueError, match="can be read only once"):
        trainer.teleport()


@pytest.mark.parametrize("stream", ONCE.values(), ids=ONCE)
def test_beside_such_a_stream_rows_of_their_own_teleport(tmp_path, stream):
    assert_as_without(tmp_path, made=lambda: {"train_dataset": stream(), "teleport_dataset": Texts(6)})


def test_a_loader_that_can_be_read_once(tmp_path, caplog):
    mixin = own_loader(lambda: DataLoader(Once(), batch_size=4, collate_fn=pad))
    assert_as_without(tmp_path, mixin, lambda: {"train_dataset": None}, events=0)
    assert "can be read only once" in caplog.text
    assert read_once(batch for batch in [1])
    assert not any(map(read_once, ([1], Stream(), DataLoader(Stream()), DataLoader([1, 2]), None, Texts())))


def test_where_no_teleport_is_due_nothing_is_said(tmp_path, caplog):
    run(tmp_path, made={"train_dataset": Once()}, off=True)
    assert "read only once" not in caplog.text


def test_batches_that_cannot_be_made_are_said_with_the_ways_out(tmp_path):
    trainer = make(tmp_path, made={"teleport_dataset": ["a line", "another"]}, max_steps=3)
    with pytest.raises(Exception, match="override get_teleport_dataloader"):
        trainer.train()
    assert trainer.state.global_step == 0


# --- Batches with nothing to learn ------------------------------------------------------------------------------------------


class Padded(Texts):
    """Rows of which only a few have labels."""

    def __init__(self, learn, **settings):
        super().__init__(**settings)
        for i, row in enumerate(self.rows):
            if i not in learn:
                row["labels"] = torch.full_like(row["input_ids"], -100)


@pytest.mark.parametrize("method", ["auto", "null_space"])
def test_a_batch_without_labels_is_no_data(tmp_path, caplog, method):
    caplog.set_level("INFO", logger="hf_teleport")
    learn = [0, 1, 2, 3, 4]
    trainer = run(
        tmp_path,
        made={"train_dataset": Padded(learn)},
        config={"method": method, "steps": [2], "batch_size": 1, "budget": None},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    (report,) = trainer.teleport_reports
    assert (report.method, report.stopped_because) == ("basis" if method == "auto" else "null_space", "steps_done")
    assert "batches with no label to learn from were passed over" in caplog.text
    known = [Texts().rows[i]["input_ids"].tolist() for i in learn]
    assert all(row in known for row in rows_of(trainer.drawn[-1]))
    assert trainer.drawn[-1].left_out > 0


def test_where_no_row_has_a_label_training_goes_on(tmp_path, caplog):
    trainer = run(tmp_path, made={"train_dataset": Padded([]), "teleport_dataset": None})
    assert trainer.state.global_step == 4
    assert trainer.teleport_reports[0].stopped_because == "non_finite"


@pytest.mark.parametrize(
    ("batch", "shifted", "count"),
    [
        ({"labels": torch.tensor([[1, -100, 2]])}, False, 2),
        ({"labels": torch.tensor([[1, -100, 2]])}, True, 1),
        ({"labels": torch.tensor([[1, -100, -100]])}, True, 0),
        ({"labels": torch.tensor([[1, 2]]), "shift_labels": torch.tensor([[2, -100]])}, True, 1),
        ({"labels": torch.tensor([0.5, -100.0])}, False, None),
        ({"labels": torch.tensor([1, -100])}, False, 1),
        ({"labels": [torch.tensor([1])]}, False, None),
        ({"input_ids": torch.tensor([[1]])}, False, None),
        ((torch.tensor([1]), torch.tensor([-100])), False, None),
    ],
)
def test_items(batch, shifted, count):
    assert num_items(batch, shifted) == count


class Masked:
    """A loss of its own: a mean over a mask that labels say nothing of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = -model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        mask = inputs["input_ids"][:, :1] % 3 == 0  # rows that count
        return (losses * mask).sum() / (mask.sum() * losses.shape[1])


@pytest.mark.parametrize("method", ["auto", "null_space"])
def test_the_mean_over_no_items_of_a_loss_of_ones_own(tmp_path, caplog, method):
    config = {"method": method, "steps": [2], "batch_size": 1, "num_batches": 8, "budget": None}
    trainer = run(tmp_path, Masked, {"train_dataset": Texts()}, config, per_device_train_batch_size=8)
    counted = [int(batch["input_ids"][0, 0]) % 3 == 0 for batch in trainer.drawn[-1].batches]
    assert 0 < sum(counted) < 8
    assert f"{8 - sum(counted)} of 8 teleport batches were left out" in caplog.text
    (report,) = trainer.teleport_reports
    assert report.steps
    assert report.method == ("basis" if method == "auto" else "null_space")


def test_losses_of_batches_are_weighted_by_their_items_as_in_training(tmp_path):
    rows = Padded([], count=18)
    for i, row in enumerate(rows.rows):
        row["labels"][1 : 2 + i % 5] = row["input_ids"][1 : 2 + i % 5]
    config = {"num_batches": 6, "steps": [0]}
    trainer = make(tmp_path, llama(), teleports("null_space", **config), made={"train_dataset": rows}, max_steps=1)
    model, batches = trainer.model.eval(), trainer._draw(6, event=0).batches
    counts = [num_items(batch, shifted=True) for batch in batches]
    assert len(set(counts)) > 1
    with torch.no_grad():
        total = sum(float(model(**batch).loss) * count for batch, count in zip(batches, counts, strict=True))
    trainer.train()
    (report,) = trainer.teleport_reports
    assert report.loss_before == pytest.approx(total / sum(counts), rel=1e-5)


def test_of_equal_batches_the_loss_is_plain_trainers_to_the_last_bit(tmp_path):
    class Equal(Texts):
        def __init__(self):
            super().__init__()
            self.rows = [{name: torch.arange(8) + i for name in ("input_ids", "labels")} for i in range(18)]

    trainer = make(tmp_path, made={"train_dataset": Equal()})
    (batch,) = trainer._draw(1, event=0).batches
    _, count = Trainer.get_batch_samples(trainer, iter([batch]), 1, torch.device("cpu"))
    plain = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    assert torch.equal(trainer._teleport_loss(trainer.model, batch), plain)
