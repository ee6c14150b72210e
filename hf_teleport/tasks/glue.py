"""Text classification or regression, on a GLUE task, or on one or two columns of text with a label."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, set_seed

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.inputs.columns import label_column, text_column
from hf_teleport.tasks.arguments import DataArguments, TextModelArguments, parse
from hf_teleport.tasks.labels import Labels
from hf_teleport.tasks.model import make_config, make_model, make_tokenizer, token_settings
from hf_teleport.tasks.run import run
from hf_teleport.tasks.tables import load_tables
from hf_teleport.tasks.text import row_length

GLUE = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class GlueArguments(DataArguments):
    """The task or its columns, and the length of a row.

    Raises:
        ValueError: the task is unknown, or there are more than two columns of text.
    """

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task of the Hub: {', '.join(GLUE)}."})
    text_column_names: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text. Default: the task's, or the first column of text."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of classes, or of numbers for a regression."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens; longer rows are cut. Default: 128, or fewer if the model takes fewer."},
    )

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in GLUE:
            raise ValueError(f"task_name = {self.task_name!r} is not allowed; allowed: one of {list(GLUE)}.")
        if self.text_column_names is not None and not 1 <= len(self.text_column_names) <= 2:
            raise ValueError(f"text_column_names = {self.text_column_names} is not allowed; allowed: one or two columns.")
        if self.task_name and not (self.dataset_name or self.train_file):
            self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, for two classes also F1 and Matthews' correlation. For a regression: squared error and Pearson's correlation."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    truth = np.asarray(prediction.label_ids)
    if logits.shape[-1] == 1:
        return {"mse": float(np.square(logits[:, 0] - truth).mean()), "pearson": _correlation(logits[:, 0], truth)}
    found = logits.argmax(-1)
    measured = {"accuracy": float((found == truth).mean())}
    if logits.shape[-1] == 2:
        measured["f1"] = float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))
        measured["matthews_correlation"] = _correlation(found, truth)  # Matthews' correlation is Pearson's of zeros and ones
    return measured


def _correlation(found: Any, truth: Any) -> float:
    return float(np.corrcoef(found, truth)[0, 1]) if np.ptp(found) and np.ptp(truth) else 0.0


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics."""
    kinds = (TextModelArguments, GlueArguments, TeleportTrainingArguments)
    model_args, data_args, training_args = parse("glue", kinds, argv, __doc__)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data"):
        asked = data_args.text_column_names or GLUE.get(str(data_args.task_name), [None])

        def check(rows: Any, source: str) -> list[str]:
            label_column(rows, data_args.label_column_name, source)
            return [text_column(rows, name, source) for name in asked]

        tables = load_tables(data_args, check, training_args.seed)
        columns = check(tables["train"], "the training rows")
        labels = Labels.of(tables["train"], data_args.label_column_name)
        tokenizer = make_tokenizer(
            model_args, lambda: [text for column in columns for text in tables["train"][column]], masked=True
        )
        config = make_config(model_args, token_settings(tokenizer), **labels.settings)
        length = row_length("max_seq_length", data_args.max_seq_length, 128, config, tokenizer)

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=length)
            return {**encoded, "labels": labels.numbers(rows[data_args.label_column_name])}

        tables = tables.map(encode, batched=True, remove_columns=tables["train"].column_names, desc="Tokens")

    trainer = TeleportTrainer(
        model=make_model(AutoModelForSequenceClassification, model_args, config, tokenizer),
        args=training_args,
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=scores,
    )
    return run(trainer, model_args, data_args)
