"""The collator for masked language models. It masks words at random, reproducibly."""

import zlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, default_data_collator


class Masking(DataCollatorForLanguageModeling):
    """Masks words at random in rows without labels. Rows with labels are already masked, and stay as they are.

    Only the seed and the rows of a batch decide which words are masked. So evaluations, teleports and resuming change nothing.
    """

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        if "labels" in features[0]:
            return default_data_collator(features)
        ids = torch.stack([row["input_ids"] for row in features])
        self.generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed or 0))
        return super().__call__(features, return_tensors)
