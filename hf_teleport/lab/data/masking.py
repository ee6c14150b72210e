"""Words that are masked for a masked language model."""

import zlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, default_data_collator


class Masking(DataCollatorForLanguageModeling):
    """Masks words at random in rows without labels. Rows with labels are masked already, and stay as they are.

    The seed and the rows of a batch alone decide which words: neither evaluations nor teleports nor a resumed run change them.
    """

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        if "labels" in features[0]:
            return default_data_collator(features)
        ids = torch.stack([row["input_ids"] for row in features])
        self.generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed or 0))
        return super().__call__(features, return_tensors)
