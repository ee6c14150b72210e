"""Draw the batches of an event, the same in every process and in every run with this seed."""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from hf_teleport.event.batches import num_items, num_samples, share_of
from hf_teleport.weights.isolation import own_copy

_T = TypeVar("_T")

# For one batch with something to learn, so many are looked at.
_LOOKS = 8

# Keys that are taken from a sampler that does not say how many it has.
_KEYS = 2**16


def loader(rows: Any, collate: Callable[[list[Any]], Any], batch_size: int, seed: int) -> DataLoader:
    """Batches of a data set, its rows in a random order; of a stream in its own.

    Args:
        seed: of a generator that draws for nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    streamed = isinstance(rows, IterableDataset)
    return DataLoader(
        rows,
        batch_size=batch_size,
        sampler=None if streamed else RandomSampler(rows, generator=generator),
        collate_fn=collate,
        generator=generator,
    )


def redrawn(training: Any, batch_size: int | None, ranks: int, seed: int) -> Any:
    """Batches of what another loader loads: by its data set, collator and sampler, in a random order.

    Args:
        training: what a trainer's own `get_train_dataloader` returns. What is no `DataLoader` gives its batches as they come.
        batch_size: None: that of the loader, in each of so many processes.
        seed: of a generator that draws for nothing else.
    """
    if not isinstance(training, DataLoader):
        return own_copy(training)
    rows, collate, batches = own_copy(_rows(training)), own_copy(training.collate_fn), training.batch_sampler
    while isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    generator = torch.Generator().manual_seed(seed)
    streamed, sampler = isinstance(rows, IterableDataset), getattr(batches, "sampler", training.sampler)
    if batches is None:  # what it calls rows are batches
        keys = None if streamed else _shuffled(sampler, generator)
        return DataLoader(rows, batch_size=None, sampler=keys, collate_fn=collate, generator=generator)
    if not streamed and type(batches) is not BatchSampler:  # rows that it puts together belong together
        parts = [list(keys)[:batch_size] for keys in _shuffled(batches, generator)]
        return DataLoader(rows, batch_sampler=parts, collate_fn=collate, generator=generator)
    size = batch_size or cast(BatchSampler, batches).batch_size * ranks
    if streamed or isinstance(sampler, (RandomSampler, SequentialSampler)):
        return loader(rows, collate, size, seed)
    keys = _shuffled(sampler, generator)
    return DataLoader(rows, batch_size=size, sampler=keys, collate_fn=collate, generator=generator)


def _rows(training: DataLoader) -> Any:
    rows = training.dataset
    while isinstance(rows, IterableDatasetShard):
        rows = rows.dataset
    return rows


def _shuffled(sampler: Any, generator: torch.Generator) -> list[Any]:
    """What a sampler yields, in a random order."""
    keys = list(islice(own_copy(sampler), len(sampler) if isinstance(sampler, Sized) else _KEYS))
    return [keys[i] for i in RandomSampler(keys, generator=generator)] if keys else []


class EmptyError(ValueError):
    """There is nothing to draw batches from, or nothing any more."""

    def __init__(self) -> None:
        super().__init__(
            "the data set to teleport on is empty: pass rows as train_dataset or teleport_dataset, or use plain Trainer."
        )


class ReadOnceError(ValueError):
    """Teleport batches would be taken from training."""


def unless_read_once(source: _T) -> _T:
    """The data set or loader itself.

    Raises:
        ReadOnceError: rows that are taken from it are lost to training.
    """
    if read_once(source):
        raise ReadOnceError(
            "what training reads can be read only once, so teleport batches would be taken from it. Pass rows to teleport on as "
            "teleport_dataset, or override get_teleport_dataloader."
        )
    return source


def read_once(source: Any) -> bool:
    """Whether rows that are taken from a data set or loader are lost to whoever reads it next."""
    if isinstance(source, DataLoader):
        source = _rows(source)
    if source is None or (hasattr(type(source), "__getitem__") and not isinstance(source, IterableDataset)):
        return False
    if isinstance(source, Iterator):
        return True
    own = own_copy(source)  # to begin at its first row may set it back
    if iter(own) is iter(own):
        return True
    parts = getattr(source, "__dict__", {}).values()
    inside = [part for value in parts for part in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(part, Iterator) or (isinstance(part, IterableDataset) and read_once(part)) for part in inside)


def overrides(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or a class of it, has another method of this name than a base has."""
    return name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name)


@dataclass(frozen=True)
class Drawn:
    """An event's batches, this process's share of each.

    Attributes:
        held_back: one more, None if there are no more.
        left_out: how many were passed over because they have no label to learn from.
    """

    batches: list[Any]
    held_back: Any = None
    left_out: int = 0


def draw(batches: Iterable[Any], count: int, rank: int, ranks: int, shifted: bool = False) -> Drawn:
    """Take so many batches that have something to learn from, and one more; if none has, those that come first.

    Args:
        batches: the same in every process.
        rank, ranks: which process this is, of how many.
        shifted: as `num_items` takes it.
    """
    found: list[Any] = []
    empty: list[Any] = []
    for batch in islice(batches, _LOOKS * (count + 1)):
        (empty if num_items(batch, shifted) == 0 else found).append(batch)
        if len(found) > count:
            break
    shares = [share_of(batch, rank, ranks) for batch in found or empty[: count + 1]]
    return Drawn(shares[:count], shares[count] if len(shares) > count else None, len(empty) if found else 0)


def items_per_sample(batches: list[Any], counts: list[Any]) -> float | None:
    """How many items a sample of these batches has in the mean. None: unknown.

    Args:
        counts: for each batch the items that its loss is divided by, None if it is divided by none.
    """
    samples = [num_samples(batch) for batch in batches]
    if not batches or None in samples or any(count is None for count in counts):
        return None
    return float(sum(counts)) / sum(size for size in samples if size)
