"""Draw the batches of an event, the same in every process and in every run with this seed."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from hf_teleport.event.batches import share_of


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


def draw(batches: Iterable[Any], count: int, rank: int, ranks: int) -> tuple[list[Any], Any]:
    """This process's share of so many batches, and of one more to hold back: None if there are no more.

    Args:
        batches: the same in every process.
        rank, ranks: which process this is, of how many.
    """
    shares = [share_of(batch, rank, ranks) for batch in islice(batches, count + 1)]
    return shares[:count], shares[count] if len(shares) > count else None
