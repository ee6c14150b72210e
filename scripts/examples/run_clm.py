"""Train or fine-tune a causal language model on a text file or a data set, with teleports.

    python scripts/examples/run_clm.py --train_file my.txt --output_dir runs/clm --max_steps 100 --teleport_method auto \
        --model_type llama --config_overrides hidden_size=64,num_hidden_layers=2,num_attention_heads=4
    accelerate launch scripts/examples/run_clm.py --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 \
        --model_name_or_path gpt2 --output_dir runs/gpt2

An example of Transformers with two words changed: `Trainer` is `TeleportTrainer`, `TrainingArguments` is
`TeleportTrainingArguments`. Everything else is as you know it.
"""

import math
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from hf_teleport import TeleportTrainer, TeleportTrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Fine-tune the model of this folder or Hub id."})
    model_type: str = field(default="llama", metadata={"help": "Without model_name_or_path: random weights of this type."})
    config_overrides: str | None = field(default=None, metadata={"help": "Of random weights: hidden_size=64,num_hidden_layers=2"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's, or one made from the text."})
    vocab_size: int = field(default=5000, metadata={"help": "Of a tokenizer that is made from the text."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A local folder or a Hub id."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of the data sets there."})
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .csv, .json or .parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a twentieth of the training rows."})
    text_column: str | None = field(default=None, metadata={"help": "Default: 'text', or the first column."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a row."})


def load_texts(arguments: DataArguments, seed: int):
    """The training and the validation rows, and the column of their text."""
    if arguments.dataset_name:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif arguments.train_file:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        kind = {"txt": "text", "jsonl": "json"}.get(suffix := arguments.train_file.rpartition(".")[2], suffix)
        splits = load_dataset(kind, data_files={split: file for split, file in files.items() if file})
    else:
        raise ValueError("there is no text: give train_file or dataset_name.")
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        train, validation = train.train_test_split(0.05, seed=seed).values()
    return train, validation, arguments.text_column or ("text" if "text" in train.column_names else train.column_names[0])


def make_tokenizer(arguments: ModelArguments, texts):
    """The saved tokenizer, or a byte-level BPE of the training text."""
    if name := arguments.tokenizer_name or arguments.model_name_or_path:
        return AutoTokenizer.from_pretrained(name)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def make_model(arguments: ModelArguments, tokenizer, block_size: int):
    """The saved model, or one with random weights."""
    if arguments.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pairs = [pair.split("=") for pair in (arguments.config_overrides or "").split(",") if pair]
    sizes = {name: int(value) for name, value in pairs}
    config = CONFIG_MAPPING[arguments.model_type](max_position_embeddings=block_size, use_cache=False, **tokens, **sizes)
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TeleportTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    train, validation, column = load_texts(data_args, training_args.seed)
    tokenizer = make_tokenizer(model_args, train[column])

    def blocks(rows):
        """All texts one after the other, an end mark after each, cut into rows of equal length."""
        texts = [text for text in rows[column] if text]
        ids = list(chain.from_iterable([*each, tokenizer.eos_token_id] for each in tokenizer(texts)["input_ids"]))
        size = data_args.block_size
        cut = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": [list(row) for row in cut]}

    with training_args.main_process_first(desc="tokens"):
        train, validation = (rows.map(blocks, batched=True, remove_columns=rows.column_names) for rows in (train, validation))

    trainer = TeleportTrainer(
        model=make_model(model_args, tokenizer, data_args.block_size),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)

    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
