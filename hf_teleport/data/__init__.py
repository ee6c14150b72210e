"""Data sets as tensors that the Trainer can draw batches from."""

from hf_teleport.data.images import ImageTensors, load_images
from hf_teleport.data.rows import TensorRows
from hf_teleport.data.series import SeriesWindows, load_series
from hf_teleport.data.text import Texts, language_model_rows, load_texts, sentence_rows, word_tokenizer

__all__ = [
    "ImageTensors",
    "SeriesWindows",
    "TensorRows",
    "Texts",
    "language_model_rows",
    "load_images",
    "load_series",
    "load_texts",
    "sentence_rows",
    "word_tokenizer",
]
