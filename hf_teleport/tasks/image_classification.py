"""Image classification, on a data set with images and labels, or on a folder of image files for each class."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, ViTImageProcessor, set_seed

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.inputs.columns import file_column, label_column
from hf_teleport.inputs.models import from_saved
from hf_teleport.inputs.rows import shortened
from hf_teleport.tasks.arguments import FolderDataArguments, ModelArguments, parse
from hf_teleport.tasks.labels import Labels
from hf_teleport.tasks.model import make_config, make_model
from hf_teleport.tasks.run import run
from hf_teleport.tasks.tables import load_tables


@dataclass
class ImageArguments(FolderDataArguments):
    """Columns of images and labels."""

    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of images. Default: the first column of images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of classes. Default: the first of the type ClassLabel, or 'label'."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the image processor. Default: model_name_or_path."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "For random weights: resize to this height and width. Default: the config's own, or 224."}
    )


def image_processor(model_args: ModelArguments, data_args: ImageArguments, config: Any) -> Any:
    """The saved processor, or a new one that resizes to the config's size and scales pixels to between -1 and 1."""
    name = data_args.image_processor_name or model_args.model_name_or_path
    if name:
        argument = "image_processor_name" if data_args.image_processor_name else "model_name_or_path"
        return from_saved(AutoImageProcessor.from_pretrained, argument, name, revision=model_args.model_revision)
    size = data_args.image_size or getattr(config, "image_size", 224)
    return ViTImageProcessor(size={"height": size, "width": size})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def decode(entry: dict[str, Any]) -> Any:
    """Decode an image by Pillow.

    Args:
        entry: `bytes` of an image file, or its `path`.

    Raises:
        ValueError: the image can't be read.
    """
    try:
        return Image().decode_example(entry)
    except (OSError, ValueError) as error:
        place = entry.get("path") or "in the data"
        raise ValueError(f"the image {place} could not be read, remove it: {shortened(error)}") from error


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `pixel_values` (N, channels, height, width) and `labels` (N,)."""
    return {
        "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics."""
    kinds = (ModelArguments, ImageArguments, TeleportTrainingArguments)
    model_args, data_args, training_args = parse("image_classification", kinds, argv, __doc__)
    set_seed(training_args.seed)
    # Trainer drops columns that the model does not take, so it would drop the images before they become pixels.
    training_args.remove_unused_columns = False

    def check(rows: Any, source: str) -> str:
        column = file_column(rows, data_args.image_column_name, Image, source)
        label_column(rows, data_args.label_column_name, source)
        return column

    with training_args.main_process_first(desc="data"):
        tables = load_tables(data_args, check, training_args.seed)
    image = check(tables["train"], "the training rows")
    labels = Labels.of(tables["train"], data_args.label_column_name)
    # A parquet file that `datasets` did not write has the encoded bytes without their type.
    tables = tables.cast_column(image, Image(decode=False)).select_columns([image, labels.column])
    fresh = {"image_size": data_args.image_size} if data_args.image_size else {}
    config = make_config(model_args, fresh, **labels.settings)
    processor = image_processor(model_args, data_args, config)

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [decode(entry).convert("RGB") for entry in rows[image]]
        return {**processor(pictures, return_tensors="pt"), "labels": labels.numbers(rows[labels.column])}

    tables.set_transform(pixels)
    trainer = TeleportTrainer(
        model=make_model(AutoModelForImageClassification, model_args, config),
        args=training_args,
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=processor,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    return run(trainer, model_args, data_args)
