"""Draw the batches of an event. They are the same on every process, and in every run with the same seed."""

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

# For each batch that is needed, at most this many are searched for one with labels.
_LOOKS = 8

# Number of keys that are taken from a sampler without a length.
_KEYS = 2**16


def loader(rows: Any, collate: Callable[[list[Any]], Any], batch_size: int, seed: int) -> DataLoader:
    """Batches of a data set in random order. A stream keeps its order.

    Args:
        seed: the seed of a separate generator.
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
    """Batches in random order from another loader's data set, with its collator and sampler.

    Args:
        training: the result of a trainer's own `get_train_dataloader`. If it is no `DataLoader`, its batches keep their order.
        batch_size: rows in a batch. None: the loader's own number, times `ranks`.
        ranks: number of processes.
        seed: the seed of a separate generator.
    """
    if not isinstance(training, DataLoader):
        return own_copy(training)
    rows, collate, batches = own_copy(_rows(training)), own_copy(training.collate_fn), training.batch_sampler
    while isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    generator = torch.Generator().manual_seed(seed)
    streamed, sampler = isinstance(rows, IterableDataset), getattr(batches, "sampler", training.sampler)
    if batches is None:  # the rows of the data set are already batches
        keys = None if streamed else _shuffled(sampler, generator)
        return DataLoader(rows, batch_size=None, sampler=keys, collate_fn=collate, generator=generator)
    if not streamed and type(batches) is not BatchSampler:  # a custom batch sampler: rows of a batch belong together
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
    """The keys that a sampler yields, in random order."""
    keys = list(islice(own_copy(sampler), len(sampler) if isinstance(sampler, Sized) else _KEYS))
    return [keys[i] for i in RandomSampler(keys, generator=generator)] if keys else []


class EmptyError(ValueError):
    """The data set to teleport on is empty, or its stream has ended."""

    def __init__(self) -> None:
        super().__init__(
            "the data set to teleport on is empty: pass rows as train_dataset or teleport_dataset, or use plain Trainer."
        )


class ReadOnceError(ValueError):
    """Drawing teleport batches would take rows away from training."""


def unless_read_once(source: _T) -> _T:
    """Return the data set or loader unchanged, if it can be read more than once.

    Raises:
        ReadOnceError: rows that are taken from it are lost to training.
    """
    if read_once(source):
        raise ReadOnceError(
            "the training data can be read only once, so teleport batches would take rows away from training. Pass rows to "
            "teleport on as teleport_dataset, or override get_teleport_dataloader."
        )
    return source


def read_once(source: Any) -> bool:
    """Whether a data set or loader can be read only once, so that rows taken from it are lost to the next reader."""
    if isinstance(source, DataLoader):
        source = _rows(source)
    if source is None or (hasattr(type(source), "__getitem__") and not isinstance(source, IterableDataset)):
        return False
    if isinstance(source, Iterator):
        return True
    own = own_copy(source)  # a copy, because starting an iteration may reset the original
    if iter(own) is iter(own):
        return True
    parts = getattr(source, "__dict__", {}).values()
    inside = [part for value in parts for part in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(part, Iterator) or (isinstance(part, IterableDataset) and read_once(part)) for part in inside)


def overrides(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or one of its classes, overrides a method of a base class."""
    return name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name)


@dataclass(frozen=True)
class Drawn:
    """An event's batches. Each is this process's share.

    Attributes:
        batches: the teleport batches.
        held_back: one more batch, for a check. None: there are no more.
        left_out: number of batches that were skipped because they have no labels that count.
    """

    batches: list[Any]
    held_back: Any = None
    left_out: int = 0


def draw(batches: Iterable[Any], count: int, rank: int, ranks: int, shifted: bool = False) -> Drawn:
    """Take `count` batches whose labels count, and one more. If there is no such batch, take the first ones.

    Args:
        batches: the same batches on every process.
        rank, ranks: the number of this process, and the number of processes.
        shifted: as for `num_items`.
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
    """The mean number of items in a sample of these batches. None: unknown.

    Args:
        counts: for each batch, the number of items that divides its loss. None: its loss is divided by no number of items.
    """
    samples = [num_samples(batch) for batch in batches]
    if not batches or None in samples or any(count is None for count in counts):
        return None
    return float(sum(counts)) / sum(size for size in samples if size)
