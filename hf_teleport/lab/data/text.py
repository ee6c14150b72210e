"""Text from the catalogue, the Hub or a local folder: tokenizers made from it, and rows for language models and classifiers."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_teleport.lab.data.catalogue import Source
from hf_teleport.lab.data.rows import TensorRows, class_labels, column, split_roles
from hf_teleport.reporting.extras import require_extra

PAD, UNKNOWN, END, START, MASK = "<pad>", "<unk>", "<eos>", "<cls>", "<mask>"

# Number of texts that are tokenized at once.
_ENCODED_AT_ONCE = 1000


@dataclass(frozen=True)
class Texts:
    """Sentences (N), and their classes (N,) if the data have classes."""

    sentences: list[str]
    labels: Tensor | None = None


def load_texts(
    source: str | Source,
    text_column: str = "sentence",
    label_column: str | None = None,
    *,
    folder: str | Path | None = None,
) -> dict[str, Texts]:
    """Texts by role: 'train', 'test', and 'validation'. Without a test split the validation split takes its role.

    Args:
        source: a name of the catalogue, a Hub id, or a folder with train and test or validation files (parquet, csv, json).
        text_column: the column of the text.
        label_column: the column of the class, a whole number from 0. None: the texts have no classes.
        folder: a local copy of the data set.

    Raises:
        FileNotFoundError: the data are not stored here, and can't be downloaded.
        ValueError: a split or a column is missing, or a label is negative (unlabelled test sets have -1).
    """
    return {
        role: Texts(column(split, text_column), None if label_column is None else class_labels(split, label_column))
        for role, split in split_roles(source, folder).items()
    }


def treebank_words(sentences: list[str]) -> list[str]:
    """Put blanks between the words that NLTK's `TreebankWordTokenizer` finds, for `word_tokenizer`.

    Penn Treebank's <unk> stays one word, although the tokenizer splits off angle brackets. Its N for a number does not change.
    The tokenizer gets single sentences, so it splits off the full stop at an end, even if that belongs to an abbreviation.

    Raises:
        ModuleNotFoundError: NLTK is not installed.
    """
    tokenize = require_extra("nltk.tokenize").TreebankWordTokenizer().tokenize
    apart = " ".join(tokenize(UNKNOWN))
    return [" ".join(tokenize(sentence)).replace(apart, UNKNOWN) for sentence in sentences]


def word_tokenizer(sentences: list[str], vocabulary_size: int | None, masked: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the most frequent words between blanks.

    Args:
        sentences: the training text.
        vocabulary_size: the largest number of tokens, with the special tokens. None: one for every word.
        masked: for BERT-like models. There is a <mask>, and each sentence begins with a <cls>.

    Raises:
        ValueError: the special tokens fill the vocabulary.
    """
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END}
    if masked:
        special |= {"cls_token": START, "mask_token": MASK}
    vocabulary_size = sys.maxsize if vocabulary_size is None else vocabulary_size
    if vocabulary_size <= len(special):
        raise ValueError(
            f"vocabulary_size = {vocabulary_size} is not allowed; allowed: more than the {len(special)} special tokens."
        )
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    # Not `Whitespace`, which also splits at punctuation and would split words such as N.Y. and <unk>.
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reserved = list(special.values())
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary_size, special_tokens=reserved, show_progress=False)
    # If the text has a special token as a word (Penn Treebank's <unk>), that word must not get a second number.
    words = ([word for word in sentence.split() if word not in reserved] for sentence in sentences)
    tokenizer.train_from_iterator((" ".join(kept) for kept in words), trainer)
    if masked:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_pair_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE. It can encode every text, and decodes it exactly.

    Args:
        texts: the training text.
        vocabulary_size: the largest number of tokens, with those for padding, the end of a text and masks.

    Raises:
        ValueError: the vocabulary has no room for every byte.
    """
    special = {"pad_token": PAD, "eos_token": END, "mask_token": MASK}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fewest = len(special) + len(alphabet)
    if vocabulary_size < fewest:
        raise ValueError(
            f"vocabulary_size = {vocabulary_size} is not allowed; allowed: {fewest} or more, because every byte needs a token."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def saved_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or a Hub id.

    Raises:
        ValueError: it can't be read, or it has no token for padding or for the end of a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer = {str(source)!r} could not be read ({error}); allowed: a folder or a Hub id with a saved tokenizer."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer = {str(source)!r} has no token for padding or for the end of a text; allowed: one that has.")
    return tokenizer


def splits_at_blanks(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether its tokens are the words between blanks, as `word_tokenizer` makes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.model, models.WordLevel)


def language_model_rows(sentences: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> TensorRows:
    """The sentences in sequence, with <eos> after each, cut into blocks by `blocks_of`.

    Raises:
        ValueError: as `blocks_of`.
    """
    return blocks_of(token_stream(sentences, tokenizer), length)


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The tokens (N,) of all texts in sequence, with <eos> after each text."""
    end = tokenizer.eos_token_id
    parts = [torch.empty(0, dtype=torch.int64)]
    # In chunks, because a list of all tokens takes many times the memory of a tensor.
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        encoded = tokenizer(texts[start : start + _ENCODED_AT_ONCE], add_special_tokens=False)["input_ids"]
        parts.append(torch.tensor([token for text in encoded for token in (*text, end)]))
    return torch.cat(parts)


def blocks_of(stream: Tensor, length: int) -> TensorRows:
    """Tokens (N,) cut into blocks: `input_ids` and `labels` (N // length, length).

    The labels equal the inputs, because Transformers' models shift them. An incomplete last block is left out.

    Raises:
        ValueError: the text is shorter than one block.
    """
    count = len(stream) // length
    if not count:
        raise ValueError(f"length = {length} is not allowed; allowed: at most the {len(stream)} tokens that the text has.")
    blocks = stream[: count * length].view(count, length)
    return TensorRows(input_ids=blocks, labels=blocks)


def sentence_rows(texts: Texts, tokenizer: PreTrainedTokenizerFast, length: int) -> TensorRows:
    """A row for each sentence, padded or cut: `input_ids` and `attention_mask` (N, length), and `labels` (N,) of classes."""
    encoded = tokenizer(
        texts.sentences,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    labels = {} if texts.labels is None else {"labels": texts.labels}
    return TensorRows(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **labels)
