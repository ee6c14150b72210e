"""Text to text: summarisation, translation, or any columns of sources and targets. Generated texts are scored."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_teleport import TeleportMixin, TeleportTrainingArguments
from hf_teleport.inputs.columns import text_column
from hf_teleport.inputs.rows import shortened
from hf_teleport.tasks.arguments import DataArguments, TextModelArguments, parse
from hf_teleport.tasks.model import make_config, make_model, make_tokenizer, token_settings
from hf_teleport.tasks.run import run
from hf_teleport.tasks.tables import load_tables


class TeleportSeq2SeqTrainer(TeleportMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that teleports."""


@dataclass
class TeleportSeq2SeqTrainingArguments(TeleportTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the teleport settings."""


@dataclass
class Seq2SeqArguments(DataArguments):
    """Sources, targets, and their lengths.

    Raises:
        ValueError: there are no targets, or several arguments give them.
    """

    text_column: str | None = field(
        default=None, metadata={"help": "Column of sources. Default: 'text', or the first column of text."}
    )
    summary_column: str | None = field(default=None, metadata={"help": "Column of targets."})
    source_lang: str | None = field(
        default=None, metadata={"help": "Language of the sources, for a column 'translation' of texts by language."}
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "Language of the targets, for a column 'translation' of texts by language."}
    )
    first_words: int | None = field(
        default=None,
        metadata={"help": "For texts without targets: learn to repeat the first words of a text, this many. Only for a trial."},
    )
    source_prefix: str = field(default="", metadata={"help": "Text to put before each source: 'summarize: ' for T5."})
    max_source_length: int = field(default=1024, metadata={"help": "Longest source, in tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longest target, in tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Number of beams when texts are generated."})

    def __post_init__(self) -> None:
        ways = {
            "summary_column": self.summary_column,
            "source_lang and target_lang": self.source_lang and self.target_lang,
            "first_words": self.first_words,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise ValueError(f"targets are given by {given or 'nothing'}; allowed: exactly one of {', '.join(ways)}.")

    def check(self, rows: Any, source: str) -> None:
        """Check that every row has a source and a target.

        Raises:
            ValueError: there is no such column or language, or a row has no text.
        """
        if self.source_lang and self.target_lang:
            if "translation" not in rows.column_names:
                raise ValueError(f"{source}: column 'translation' is not in the data; needed with source_lang and target_lang.")
            for number, row in enumerate(rows["translation"], 1):
                for name in (self.source_lang, self.target_lang):
                    if not isinstance(row, dict) or not isinstance(row.get(name), str):
                        raise ValueError(
                            f"{source}: row {number} has {shortened(row)} in column 'translation'; allowed: texts by language, "
                            f"with {self.source_lang!r} and {self.target_lang!r} among them."
                        )
            return
        text_column(rows, self.text_column, source)
        if self.summary_column:
            text_column(rows, self.summary_column, source)

    def pairs(self, rows: Any) -> Any:
        """The rows as two columns of text, 'source' and 'target'. `check` must have passed."""
        if self.source_lang and self.target_lang:
            return _mapped(rows, lambda row: [row["translation"][name] for name in (self.source_lang, self.target_lang)])
        source = text_column(rows, self.text_column, "the rows")
        if self.first_words:
            return _mapped(rows, lambda row: [row[source], " ".join(row[source].split()[: self.first_words])])
        return _mapped(rows, lambda row: [row[source], row[self.summary_column]])


def _mapped(rows: Any, pair: Any) -> Any:
    return rows.map(lambda row: dict(zip(("source", "target"), pair(row), strict=True)), remove_columns=rows.column_names)


def overlap(found: str, truth: str) -> float:
    """F1 of the words that two texts share: ROUGE-1 without stemming."""
    words, wanted = found.split(), truth.split()
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / max(1, len(words) + len(wanted))


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics."""
    kinds = (TextModelArguments, Seq2SeqArguments, TeleportSeq2SeqTrainingArguments)
    model_args, data_args, training_args = parse("seq2seq", kinds, argv, __doc__)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data"):
        tables = load_tables(data_args, data_args.check, training_args.seed)
        for name, rows in tables.items():
            tables[name] = data_args.pairs(rows)
        tokenizer = make_tokenizer(model_args, lambda: [*tables["train"]["source"], *tables["train"]["target"]])
        # A new tokenizer adds no end token, but a model must learn where a target ends.
        end = tokenizer.eos_token_id

        def encode(texts: list[str], length: int) -> list[list[int]]:
            encoded = tokenizer(texts, truncation=True, max_length=length - 1)["input_ids"]
            return [tokens if tokens[-1:] == [end] or end is None else [*tokens, end] for tokens in encoded]

        def pair(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            sources = [data_args.source_prefix + text for text in rows["source"]]
            return {
                "input_ids": encode(sources, data_args.max_source_length),
                "labels": encode(rows["target"], data_args.max_target_length),
            }

        tables = tables.map(pair, batched=True, remove_columns=["source", "target"], desc="Tokens")

    fresh = {**token_settings(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}
    model = make_model(AutoModelForSeq2SeqLM, model_args, make_config(model_args, fresh), tokenizer)

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        # Trainer pads with -100, which is no token.
        found, truth = (
            tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        pairs = [(one.strip(), other.strip()) for one, other in zip(found, truth, strict=True)]
        return {
            "exact_match": float(np.mean([one == other for one, other in pairs])),
            "word_f1": float(np.mean([overlap(one, other) for one, other in pairs])),
            "gen_len": float(np.mean([np.count_nonzero(ids != tokenizer.pad_token_id) for ids in prediction.predictions])),
        }

    trainer = TeleportSeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=scores if training_args.predict_with_generate else None,
    )
    length = training_args.generation_max_length or data_args.max_target_length
    return run(trainer, model_args, data_args, max_length=length, num_beams=data_args.num_beams)
