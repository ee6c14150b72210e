"""The arguments of the tasks, read from a YAML file and a command line. Their names are those of the Transformers examples."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser

from hf_teleport.lab.keys import require_fit, require_known
from hf_teleport.lab.settings import read


@dataclass
class ModelArguments:
    """Arguments that choose the model."""

    _argument_group_name = "model"  # the group in which --help lists them

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Saved model to start from: a folder or a Hub id. Without it give config_name, for random weights."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "For random weights: a model type (bert, llama, vit, ...), or a folder or Hub id that has a config.",
            "aliases": ["--model_type"],
        },
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Settings of the new config: 'hidden_size=64,num_hidden_layers=2', or in YAML a mapping."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the Hub's model."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Replace weights of a saved model if their size differs, for instance for another number of classes."},
    )


@dataclass
class TextModelArguments(ModelArguments):
    """Arguments that choose the model and its tokenizer."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer. Default: model_name_or_path."}
    )
    train_tokenizer_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Make a tokenizer with this many tokens, from the most frequent words of the training text."},
    )


@dataclass
class DataArguments:
    """Arguments that choose the data."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a local folder with train and validation or test files, instead of train_file."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Name of the data set, if the Hub id has several."})
    train_file: str | None = field(
        default=None, metadata={"help": "File of training rows: .csv, .json, .jsonl, .parquet or .txt."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File of the same kind to evaluate on. Default: part of the training rows."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training rows, in %%, to evaluate on if there are no other rows for that."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train only on the first rows, this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate only on the first rows, this many."})


@dataclass
class FolderDataArguments(DataArguments):
    """Arguments that choose the data. They may be folders whose subfolders are the classes."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with a subfolder of files for each class, instead of train_file."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Such a folder to evaluate on."})


def parse(task: str, kinds: Iterable[Any], argv: list[str], description: str | None = None) -> tuple[Any, ...]:
    """Make an object of each dataclass in `kinds` from the arguments of a command line.

    The first argument may be a YAML file. It can set all arguments, and those after it override the file. A file may inherit from
    another by `base: other.yaml`. Without an `output_dir` its run goes to runs/FOLDER/NAME.

    Raises:
        FileNotFoundError: there is no such YAML file.
        ValueError: a key of the file or an argument is unknown (the message gives the nearest one), or a value is not allowed.
        SystemExit: a value on the command line can't be parsed, or --help was given.
    """
    kinds, words = list(kinds), list(argv)
    known = {f.name: kind for kind in kinds for f in fields(kind) if f.init}
    parser = HfArgumentParser(
        kinds,
        prog=f"hf-teleport train {task}",
        usage="%(prog)s [CONFIG.yaml] [--ARGUMENT VALUE ...]",
        description=description,
        epilog="A YAML file with the same names can set all of them. The command line overrides the file.",
    )
    if words and not words[0].startswith("-"):
        file = words.pop(0)
        settings = read(file)
        for key, value in settings.items():
            require_known(key, known, file)
            try:
                require_fit(key, value, known[key])
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        parser.set_defaults(**settings)
    *made, rest = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not allowed there; allowed: --ARGUMENT VALUE, after the YAML file.")
        require_known(word[2:].partition("=")[0].replace("-", "_"), known, "the command line")
    return tuple(made)
