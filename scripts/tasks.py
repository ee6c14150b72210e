"""The tasks of run_task.py: what is trained on what, and with which sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from run_image_classification import accuracy
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from hf_teleport.lab.data import (
    TensorRows,
    Texts,
    language_model_rows,
    load_images,
    load_series,
    load_texts,
    sentence_rows,
    word_tokenizer,
)
from hf_teleport.lab.models import SeriesConfig, SeriesTransformer


@dataclass
class TaskArguments:
    """What to train on what. A size that a task has no use for is ignored."""

    task: Literal["lm", "mlm", "text_classification", "image", "series"] = field(
        default="lm", metadata={"help": "'lm' and 'mlm': language models, causal and masked, from scratch."}
    )
    dataset: str = field(default="../shared/data/ptb", metadata={"help": "A local folder of parquet files, or a Hub id."})
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "text_classification: start from the model and tokenizer in this folder, of an mlm run. Empty: from scratch."
        },
    )
    architecture: Literal["llama", "qwen3", "gemma", "gpt2"] = field(default="llama", metadata={"help": "lm: which model."})
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    layers: int = field(default=4, metadata={"help": "Blocks."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    kv_heads: int | None = field(default=None, metadata={"help": "lm: heads of keys and values. Default: `heads`."})
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Width of the MLP. Default: 8/3 of the width in multiples of 8 where it is gated, else 4 of it."},
    )
    tie_embeddings: bool = field(default=False, metadata={"help": "lm: the output head is the embedding."})
    dropout: float = field(default=0.0, metadata={"help": "Of models from scratch."})
    length: int = field(default=128, metadata={"help": "Tokens in a row; series: time steps that the model sees."})
    vocabulary_size: int = field(default=10000, metadata={"help": "Words that have a token, special tokens counted in."})
    text_column: str = field(default="sentence", metadata={"help": "Where the text is."})
    label_column: str = field(default="label", metadata={"help": "text_classification: where the class is."})
    image_size: int | None = field(default=None, metadata={"help": "image: resize to this height and width."})
    patch_size: int = field(default=4, metadata={"help": "image: height and width of a patch."})
    horizon: int = field(default=24, metadata={"help": "series: time steps to forecast."})
    soap: bool = field(default=False, metadata={"help": "Train with SOAP instead of `optim`, with its own betas."})
    soap_precondition_frequency: int = field(default=10, metadata={"help": "Steps between SOAP's new bases."})
    soap_max_precondition_dim: int = field(
        default=2048, metadata={"help": "SOAP leaves sides of a weight that are longer (a vocabulary) in Adam's basis."}
    )
    history: str | None = field(default=None, metadata={"help": "Write the run's log to this JSON file."})
    train_loss_rows: int = field(default=64, metadata={"help": "Training rows, evenly spread, on which the loss is measured."})
    test_loss_rows: int = field(default=64, metadata={"help": "Test rows, evenly spread, on which the loss is measured."})


@dataclass
class Task:
    """Data, a maker of the fresh model, and what the trainer needs for them."""

    train: Dataset
    test: Dataset
    make_model: Callable[[], Any]
    tokenizer: PreTrainedTokenizerFast | None = None
    collator: Callable[..., Any] = default_data_collator
    metrics: Callable[..., Any] | None = None


def language_model(task: TaskArguments, seed: int) -> Task:
    train, test = load_texts(task.dataset, task.text_column)
    tokenizer = word_tokenizer(train.sentences, task.vocabulary_size)
    common = {
        "vocab_size": len(tokenizer),
        "use_cache": False,
        "tie_word_embeddings": task.tie_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if task.architecture == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": task.hidden_size,
            "n_layer": task.layers,
            "n_head": task.heads,
            "n_inner": task.intermediate_size or 4 * task.hidden_size,
            "n_positions": task.length,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), task.dropout),
        }
    else:
        sizes = {
            "hidden_size": task.hidden_size,
            "num_hidden_layers": task.layers,
            "num_attention_heads": task.heads,
            "num_key_value_heads": task.kv_heads or task.heads,
            "head_dim": task.hidden_size // task.heads,
            "intermediate_size": task.intermediate_size or round(task.hidden_size / 3) * 8,
            "max_position_embeddings": task.length,
            "attention_dropout": task.dropout,
        }
    return Task(
        language_model_rows(train.sentences, tokenizer, task.length),
        language_model_rows(test.sentences, tokenizer, task.length),
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(task.architecture, **common, **sizes)),
        tokenizer,
    )


def bert(task: TaskArguments, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Any:
    """The configuration of a BERT for this tokenizer."""
    return AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=task.hidden_size,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=task.intermediate_size or 4 * task.hidden_size,
        max_position_embeddings=task.length,
        type_vocab_size=1,
        # The scale of BERT's own weights at its width of 768: at 0.02 a narrow one passes on next to nothing, and does not learn.
        initializer_range=0.02 * (768 / task.hidden_size) ** 0.5,
        hidden_dropout_prob=task.dropout,
        attention_probs_dropout_prob=task.dropout,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


class Masking(DataCollatorForLanguageModeling):
    """Masks words at random in rows without labels. Rows with labels, those of evaluation, are masked already and stay so."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        return default_data_collator(features) if "labels" in features[0] else super().__call__(features, return_tensors)


def masked_language_model(task: TaskArguments, seed: int) -> Task:
    train, test = load_texts(task.dataset, task.text_column)
    tokenizer = word_tokenizer(train.sentences, task.vocabulary_size, masked=True)

    def unlabelled(texts: Texts) -> TensorRows:
        # Blocks of running text: sentences in rows of their own would be padding for the most part.
        return TensorRows(input_ids=language_model_rows(texts.sentences, tokenizer, task.length).columns["input_ids"])

    return Task(
        unlabelled(train),
        unlabelled(test),
        lambda: AutoModelForMaskedLM.from_config(bert(task, tokenizer)),
        tokenizer,
        # A generator of its own: which words are masked does not depend on when the run evaluates or teleports.
        Masking(tokenizer, seed=seed),
    )


def text_classification(task: TaskArguments, seed: int) -> Task:
    train, test = load_texts(task.dataset, task.text_column, task.label_column)
    labels = train.num_labels
    if not task.pretrained:
        tokenizer = word_tokenizer(train.sentences, task.vocabulary_size, masked=True)
    elif not Path(task.pretrained).is_dir():
        raise FileNotFoundError(
            f"pretrained = {task.pretrained!r} is no folder: run the mlm task first, its output_dir is the folder."
        )
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(task.pretrained)

    def make_model() -> Any:
        if task.pretrained:
            return AutoModelForSequenceClassification.from_pretrained(task.pretrained, num_labels=labels)
        return AutoModelForSequenceClassification.from_config(bert(task, tokenizer, num_labels=labels))

    rows = [sentence_rows(texts, tokenizer, task.length) for texts in (train, test)]
    return Task(*rows, make_model, tokenizer, metrics=accuracy)


def image_classification(task: TaskArguments, seed: int) -> Task:
    train, test = load_images(task.dataset, task.image_size)
    _, channels, size, _ = train.images.shape
    config = ViTConfig(
        image_size=size,
        patch_size=task.patch_size,
        num_channels=channels,
        num_labels=train.num_labels,
        hidden_size=task.hidden_size,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=task.intermediate_size or 4 * task.hidden_size,
        hidden_dropout_prob=task.dropout,
        attention_probs_dropout_prob=task.dropout,
    )
    return Task(train, test, lambda: ViTForImageClassification(config), metrics=accuracy)


def series(task: TaskArguments, seed: int) -> Task:
    train, _, test = load_series(task.dataset, task.length, task.horizon)
    config = SeriesConfig(
        channels=train.values.shape[1],
        context=task.length,
        horizon=task.horizon,
        hidden_size=task.hidden_size,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=task.intermediate_size or 4 * task.hidden_size,
    )
    return Task(train, test, lambda: SeriesTransformer(config))


TASKS: dict[str, Callable[[TaskArguments, int], Task]] = {
    "lm": language_model,
    "mlm": masked_language_model,
    "text_classification": text_classification,
    "image": image_classification,
    "series": series,
}
