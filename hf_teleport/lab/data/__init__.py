"""Data sets of experiments: read from the catalogue, the Hub or a folder, and held as tensors that a Trainer can read."""

from hf_teleport.lab.data.catalogue import CATALOGUE, Source
from hf_teleport.lab.data.images import ImageTensors, load_images
from hf_teleport.lab.data.masking import Masking
from hf_teleport.lab.data.pipelines import Pipeline, load
from hf_teleport.lab.data.rows import TensorRows
from hf_teleport.lab.data.sequences import load_sequences
from hf_teleport.lab.data.series import SeriesWindows, load_series
from hf_teleport.lab.data.text import Texts, language_model_rows, load_texts, sentence_rows, treebank_words, word_tokenizer

__all__ = [
    "CATALOGUE",
    "ImageTensors",
    "Masking",
    "Pipeline",
    "SeriesWindows",
    "Source",
    "TensorRows",
    "Texts",
    "language_model_rows",
    "load",
    "load_images",
    "load_sequences",
    "load_series",
    "load_texts",
    "sentence_rows",
    "treebank_words",
    "word_tokenizer",
]
