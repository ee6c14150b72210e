"""Masked language modelling: fine-tune a saved model, or train one from scratch, on a text file or a data set."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, set_seed

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.inputs.columns import text_column
from hf_teleport.tasks.arguments import DataArguments, TextModelArguments, parse
from hf_teleport.tasks.model import make_config, make_model, make_tokenizer, token_settings
from hf_teleport.tasks.run import run
from hf_teleport.tasks.tables import load_tables
from hf_teleport.tasks.text import blocks, row_length


@dataclass
class MlmArguments(DataArguments):
    """The text, the length of a row, and the share of masked tokens."""

    text_column_name: str | None = field(
        default=None, metadata={"help": "Column of texts. Default: 'text', or the first column of text."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens in a row. Default: the model's own limit, at most 1024."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics."""
    kinds = (TextModelArguments, MlmArguments, TeleportTrainingArguments)
    model_args, data_args, training_args = parse("mlm", kinds, argv, __doc__)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data"):

        def check(rows: Any, source: str) -> None:
            text_column(rows, data_args.text_column_name, source)

        tables = load_tables(data_args, check, training_args.seed)
        column = text_column(tables["train"], data_args.text_column_name, "the training rows")
        tokenizer = make_tokenizer(model_args, lambda: list(tables["train"][column]), masked=True)
        config = make_config(model_args, token_settings(tokenizer))
        length = row_length("max_seq_length", data_args.max_seq_length, 1024, config, tokenizer)
        tables = blocks(tables, tokenizer, column, length, special=True)

    trainer = TeleportTrainer(
        model=make_model(AutoModelForMaskedLM, model_args, config, tokenizer),
        args=training_args,
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability),
    )
    return run(trainer, model_args, data_args, perplexity=True)
