"""Cut a batch along its samples: into one share for each process, or into halves when memory runs short."""

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import slice_tensors
from torch import Tensor


def num_samples(batch: Any) -> int | None:
    """How many samples a batch has: the first size that all its tensors share. None: the sizes differ, or another value
    has a size of its own.
    """
    sizes = set(_sizes(batch))
    return sizes.pop() if len(sizes) == 1 else None


def _sizes(batch: Any) -> Iterator[int | None]:
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.dim() else None
    elif isinstance(batch, Mapping):
        for value in batch.values():
            # A flag or a number without a size holds for every sample.
            if not isinstance(value, (bool, int, float, str, type(None))):
                yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(value)
    else:
        yield None


def num_items(batch: Any, shifted: bool = False) -> int | None:
    """How many labels of a batch count in a loss: all except -100. None: it can't be read from the batch.

    Args:
        shifted: the loss compares each position with the label of the next, so it never uses the first label.
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim():
        return None
    counted = labels[..., 1:] if shifted and "shift_labels" not in batch else labels
    return int(counted.ne(-100).sum())


def share_of(batch: Any, index: int, count: int) -> Any:
    """Part `index` of `count` equal parts; the whole batch if it cannot be cut into equal parts."""
    samples = num_samples(batch)
    if not samples or samples % count:
        return batch
    size = samples // count
    return slice_tensors(batch, slice(index * size, (index + 1) * size))


def halved(batches: list[Any]) -> list[Any] | None:
    """Twice as many batches of half the size. None: some batch cannot be cut."""
    counts = [num_samples(batch) for batch in batches]
    if not all(count and count > 1 for count in counts):
        return None
    cuts = [(batch, (count or 0) // 2) for batch, count in zip(batches, counts, strict=True)]
    return [slice_tensors(batch, part) for batch, cut in cuts for part in (slice(cut), slice(cut, None))]


def check_given(trainer_class: Any) -> None:
    """Make sure that a trainer's batches are data. GRPO and similar trainers let the model generate them at each
    evaluation.

    Raises:
        ValueError: the trainer is TRL's and generates its batches.
    """
    if trainer_class._prepare_inputs.__module__.startswith("trl."):
        raise ValueError(
            f"{trainer_class.__name__} generates its batches with the model that it trains, so there is no loss on a teleport "
            "batch to keep. Teleport in supervised fine-tuning or preference training (SFTTrainer, DPOTrainer, RewardTrainer), "
            "or leave teleports out here: epochs=0."
        )
