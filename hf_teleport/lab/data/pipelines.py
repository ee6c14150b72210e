"""Load a data set by name, as rows for a Trainer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_teleport.lab.data.catalogue import CATALOGUE, KINDS, Source, find
from hf_teleport.lab.data.code import code_files, code_tokens
from hf_teleport.lab.data.images import load_images
from hf_teleport.lab.data.masking import Masking
from hf_teleport.lab.data.rows import TensorRows
from hf_teleport.lab.data.sequences import load_sequences
from hf_teleport.lab.data.series import load_series
from hf_teleport.lab.data.text import (
    Texts,
    blocks_of,
    language_model_rows,
    load_texts,
    saved_tokenizer,
    sentence_rows,
    splits_at_blanks,
    token_stream,
    treebank_words,
    word_tokenizer,
)


@dataclass(frozen=True)
class Pipeline:
    """A data set, ready for a Trainer.

    Attributes:
        kind: 'image' (rows of `pixel_values` and `labels`), 'sequence' (`inputs` and `labels`), 'series' (`inputs` and `labels`),
            or 'text' (`input_ids` and `labels`; for masked language models without labels).
        measure: the metric of such data, by its name in `hf_teleport.metrics`: 'accuracy', 'mean_squared_error', 'perplexity' or
            'masked_perplexity'.
        train: training rows.
        test: test rows.
        validation: rows held out for the choice of settings, if the data have them.
        tokenizer: the tokenizer of text.
        mask_probability: the share of words that are masked. None: no masked language model.
    """

    kind: str
    measure: str
    train: Dataset
    test: Dataset
    validation: Dataset | None = None
    tokenizer: PreTrainedTokenizerFast | None = None
    mask_probability: float | None = None

    def collator(self, seed: int) -> Callable[..., Any]:
        """The collator of training rows. The seed decides which words it masks."""
        if self.mask_probability is None:
            return default_data_collator
        return Masking(self.tokenizer, mlm_probability=self.mask_probability, seed=seed)

    def fixed(self, rows: Any) -> Dataset:
        """Rows for evaluation. For masked language models, words are masked once, in the same way for every run."""
        return rows if self.mask_probability is None else TensorRows(**self.collator(seed=0)([rows[i] for i in range(len(rows))]))


def load(source: str | Source, folder: str | Path | None = None, kind: str | None = None, **options: Any) -> Pipeline:
    """Load a data set from the catalogue, the Hub, or a local folder.

    Args:
        source: a name of the catalogue (mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet, smnist, electricity, traffic,
            ptb, and others), a Hub id, a local folder or file, or a `Source`.
        folder: a local copy of the data set, with train and test (or validation) files, or one data.parquet of a series.
        kind: 'image', 'sequence', 'series' or 'text'. Default: the catalogue's.
        options: options of the kind:
            image: image_size, image_column, label_column, as for `load_images`.
            sequence: length, image_column, label_column, as for `load_sequences`.
            series: context, horizon, shift, shares, columns, split, series_column, as for `load_series`. By default the context
            has 7 x 24 steps, and the horizon is as long. The shift of 24 makes the target the window a day later. The shares
            are 0.6 and 0.2, and the rest is for the test.
            text: text_column, label_column, length, vocabulary_size, tokenizer, mask_probability. By default the label column
            is the catalogue's; without one the rows are for a language model. A row has 256 tokens. The vocabulary has every
            word of the training text, and a tokenizer is made from these words; or give the tokenizer's folder or Hub id. The
            probability is for a masked language model; by default nothing is masked.
            'python' has a vocabulary of 5,000 tokens. It also takes package_megabytes (default: 3 of each training package),
            as for `code_files`.

    Raises:
        FileNotFoundError: the data are not stored here, and can't be downloaded.
        ValueError: there is no kind, an option is unknown, or the data do not fit.
    """
    entry = find(source)
    entry = replace(entry, kind=kind or entry.kind)
    if entry.kind is None:
        raise ValueError(
            f"kind = None is not allowed for {entry.path!r}; allowed: one of {list(KINDS)}. Known are {list(CATALOGUE)}."
        )
    if unknown := sorted(set(options) - set(OPTIONS[entry.kind])):
        raise ValueError(f"options {unknown} are not allowed; allowed for kind {entry.kind!r}: {OPTIONS[entry.kind]}.")
    return _PIPELINES[entry.kind](entry, folder, **options)


def _images(
    source: Source,
    folder: str | Path | None,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Pipeline:
    train, test = load_images(source, image_size, folder=folder, image_column=image_column, label_column=label_column)
    return Pipeline("image", "accuracy", train, test)


def _sequences(
    source: Source,
    folder: str | Path | None,
    length: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Pipeline:
    train, test = load_sequences(source, length, folder=folder, image_column=image_column, label_column=label_column)
    return Pipeline("sequence", "accuracy", train, test)


def _series(
    source: Source,
    folder: str | Path | None,
    context: int = 7 * 24,
    horizon: int | None = None,
    shift: int | None = 24,
    # The shares of Lai et al. (arXiv 1703.07015), the source of the electricity and traffic tables.
    shares: tuple[float, float] = (0.6, 0.2),
    columns: list[str] | None = None,
    split: str | None = None,
    series_column: str | None = None,
) -> Pipeline:
    train, validation, test = load_series(
        source,
        context,
        horizon or context,
        columns,
        shift=shift,
        shares=shares,
        folder=folder,
        split=split,
        series_column=series_column,
    )
    return Pipeline("series", "mean_squared_error", train, test, validation)


def _text(
    source: Source,
    folder: str | Path | None,
    text_column: str = "sentence",
    label_column: str | None = None,
    length: int = 256,
    vocabulary_size: int | None = None,
    tokenizer: str | Path | None = None,
    mask_probability: float | None = None,
    package_megabytes: float | None = None,
) -> Pipeline:
    if tokenizer is not None and vocabulary_size is not None:
        raise ValueError(f"vocabulary_size = {vocabulary_size} is not allowed; allowed: None, because the tokenizer has its own.")
    if source == CATALOGUE["python"] and folder is None:
        if label_column is not None:
            raise ValueError(f"label_column = {label_column!r} is not allowed; allowed: None, as source code has no classes.")
        return _code(length, vocabulary_size, tokenizer, mask_probability, package_megabytes)
    if package_megabytes is not None:
        raise ValueError(f"package_megabytes = {package_megabytes!r} is not allowed; allowed: None, except for 'python'.")
    label_column = label_column or source.label_column
    parts = load_texts(source, text_column, label_column, folder=folder)
    tokens = None if tokenizer is None else saved_tokenizer(tokenizer)
    # A word tokenizer splits at blanks, so words must be separated first. Other tokenizers take the text as it is.
    if tokens is None or splits_at_blanks(tokens):
        parts = {role: Texts(treebank_words(texts.sentences), texts.labels) for role, texts in parts.items()}
    tokens = tokens or word_tokenizer(parts["train"].sentences, vocabulary_size, masked=bool(label_column or mask_probability))

    def rows(texts: Texts) -> Dataset:
        if label_column is not None:
            return sentence_rows(texts, tokens, length)
        return _labelled(language_model_rows(texts.sentences, tokens, length), mask_probability)

    measure = "accuracy" if label_column else "masked_perplexity" if mask_probability else "perplexity"
    made = {role: rows(texts) for role, texts in parts.items()}
    return Pipeline("text", measure, tokenizer=tokens, mask_probability=mask_probability, **made)


def _code(
    length: int,
    vocabulary_size: int | None,
    tokenizer: str | Path | None,
    mask_probability: float | None,
    package_megabytes: float | None,
) -> Pipeline:
    if tokenizer is None:
        tokens, streams = code_tokens(package_megabytes, vocabulary_size)
    else:
        tokens, parts = saved_tokenizer(tokenizer), code_files(package_megabytes)
        streams = {role: token_stream(list(files.values()), tokens) for role, files in parts.items()}
    measure = "masked_perplexity" if mask_probability else "perplexity"
    made = {role: _labelled(blocks_of(stream, length), mask_probability) for role, stream in streams.items()}
    return Pipeline("text", measure, tokenizer=tokens, mask_probability=mask_probability, **made)


def _labelled(blocks: TensorRows, mask_probability: float | None) -> TensorRows:
    """Blocks of running text. For masked language models they have no labels, because the collator makes them."""
    return blocks if mask_probability is None else TensorRows(input_ids=blocks.columns["input_ids"])


_PIPELINES: dict[str, Callable[..., Pipeline]] = {"image": _images, "sequence": _sequences, "series": _series, "text": _text}

OPTIONS = {kind: list(inspect.signature(make).parameters)[2:] for kind, make in _PIPELINES.items()}
"""The options of `load`, by the kind of data."""
