"""Train or fine-tune an image classifier, with teleports; without a data set, on the digits that come with scikit-learn.

    python scripts/examples/run_image_classification.py --output_dir runs/digits --teleport_method null_space --teleport_epochs 2
    accelerate launch scripts/examples/run_image_classification.py --train_dir my/images --image_size 64 --output_dir runs/images
    python scripts/examples/run_image_classification.py --dataset_name beans --output_dir runs/beans \
        --model_name_or_path google/vit-base-patch16-224-in21k

An example of Transformers with two words changed: `Trainer` is `TeleportTrainer`, `TrainingArguments` is
`TeleportTrainingArguments`. Everything else is as you know it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from hf_teleport import TeleportTrainer, TeleportTrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Fine-tune this one. Default: a new, small ViT."})
    image_size: int | None = field(default=None, metadata={"help": "New ViT: height and width. Default: the first image's."})
    patch_size: int = field(default=2, metadata={"help": "New ViT: height and width of a patch."})
    hidden_size: int = field(default=64, metadata={"help": "New ViT: width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "New ViT: blocks."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A local folder or a Hub id."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with a folder of image files for each class."})
    validation_split: float = field(default=0.2, metadata={"help": "Share of the rows to validate on, where no split is for it."})


def load_images(arguments: DataArguments, seed: int):
    """The training and the validation rows, with the names of the columns of images and of classes."""
    if arguments.dataset_name:
        splits = load_dataset(arguments.dataset_name)
    elif arguments.train_dir:
        splits = load_dataset("imagefolder", data_dir=arguments.train_dir)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
        rows = {"image": [(16 * image).clip(0, 255).astype(np.uint8) for image in digits.images], "label": digits.target}
        splits = {"train": Dataset.from_dict(rows, features=features)}
    train = splits["train"]
    validation = splits.get("validation", splits.get("test"))
    if validation is None:
        train, validation = train.train_test_split(arguments.validation_split, seed=seed).values()
    image = next(name for name, feature in train.features.items() if isinstance(feature, Image))
    label = next(name for name, feature in train.features.items() if isinstance(feature, ClassLabel))
    return train, validation, image, label


def make_model(arguments: ModelArguments, size: int, names: list[str]):
    """A model and the processor of its images: saved ones, or new ones."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if name := arguments.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(name, **labels, ignore_mismatched_sizes=True)
        return model, AutoImageProcessor.from_pretrained(name)
    config = ViTConfig(
        image_size=size,
        patch_size=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=4,
        intermediate_size=2 * arguments.hidden_size,
        **labels,
    )
    return AutoModelForImageClassification.from_config(config), ViTImageProcessor(size={"height": size, "width": size})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TeleportTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    training_args.remove_unused_columns = False  # the images would be dropped before they are turned into pixels

    train, validation, image, label = load_images(data_args, training_args.seed)
    size = model_args.image_size or train[0][image].height
    model, processor = make_model(model_args, size, train.features[label].names)

    def pixels(rows):
        pictures = [picture.convert("RGB") for picture in rows[image]]
        return {**processor(pictures, return_tensors="pt"), "labels": rows[label]}

    def collate(rows):
        return {
            "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = TeleportTrainer(
        model=model,
        args=training_args,
        train_dataset=train.with_transform(pixels),
        eval_dataset=validation.with_transform(pixels),
        processing_class=processor,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)

    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
