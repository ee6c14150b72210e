"""Train an image classifier, with teleportation before scheduled epochs.

    python scripts/run_image_classification.py configs/mnist_mlp_sgd.yaml --learning_rate 0.03
    python scripts/run_image_classification.py --dataset digits --model cnn --output_dir runs/digits --teleport_epochs 2
    accelerate launch scripts/run_image_classification.py configs/mnist_mlp_sgd.yaml

A YAML file sets any argument, and what stands on the command line after it wins.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import ImageTensors, load_images
from hf_teleport.lab.history import History
from hf_teleport.lab.keys import from_yaml
from hf_teleport.lab.models import CNNConfig, CNNForImageClassification, MLPConfig, MLPForImageClassification


@dataclass
class ImageArguments:
    """What to train on what."""

    dataset: str = field(default="digits", metadata={"help": "'digits', a local folder with train and test files, or a Hub id."})
    model: str = field(
        default="mlp",
        metadata={"help": "'mlp', 'cnn', 'vit' (random weights), or a saved image classifier: a folder or a Hub id."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Resize the images to this height and width."})
    history: str | None = field(default=None, metadata={"help": "Write the run's log to this JSON file."})
    train_loss_rows: int = field(default=10000, metadata={"help": "Training rows on which the training loss is measured."})


def build_model(name: str, data: ImageTensors) -> Any:
    """A classifier for images of the data's shape."""
    _, channels, size, _ = data.images.shape
    labels = data.num_labels
    if name == "mlp":
        return MLPForImageClassification(MLPConfig(image_size=size, num_channels=channels, num_labels=labels))
    if name == "cnn":
        return CNNForImageClassification(CNNConfig(image_size=size, channels=(channels, 16, 32, 64), num_labels=labels))
    if name == "vit":
        return ViTForImageClassification(
            ViTConfig(
                image_size=size,
                patch_size=max(2, size // 8),
                num_channels=channels,
                num_labels=labels,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=128,
            )
        )
    return AutoModelForImageClassification.from_pretrained(name, num_labels=labels, ignore_mismatched_sizes=True)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    images: ImageArguments, training: TeleportTrainingArguments, data: tuple[ImageTensors, ImageTensors]
) -> TeleportTrainer:
    """A trainer with a fresh model; the seed decides its weights and the order of the data."""
    train, test = data
    set_seed(training.seed)
    return TeleportTrainer(
        build_model(images.model, train),
        training,
        train_dataset=train,
        eval_dataset={"train": train.first(images.train_loss_rows), "test": test},
        compute_metrics=accuracy,
    )


def parse(argv: list[str], kind: type = ImageArguments) -> tuple[Any, TeleportTrainingArguments]:
    """Arguments of the script, a dataclass, and of training: from an optional YAML file, overridden by the command line."""
    parser = HfArgumentParser([kind, TeleportTrainingArguments])
    from_file: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        file = argv.pop(0)
        from_file = from_yaml(Path(file).read_text(encoding="utf-8"), file)
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(from_file) - known):
            raise ValueError(f"unknown settings in the YAML file: {unknown}. See --help for those there are.")
    parser.set_defaults(**from_file)
    return parser.parse_args_into_dataclasses(argv)


def main(argv: list[str]) -> None:
    images, training = parse(argv)
    trainer = make_trainer(images, training, load_images(images.dataset, images.image_size))
    history = History()
    trainer.add_callback(history)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if images.history and trainer.is_world_process_zero():
        Path(images.history).write_text(json.dumps(history.rows))
    scores = trainer.evaluate()
    if trainer.is_world_process_zero():
        for name, value in scores.items():
            print(f"{name:30} {value:.4f}")
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
