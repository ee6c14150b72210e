"""Audio classification, on a data set with sounds and labels, or on a folder of sound files for each class. Needs no ffmpeg."""

from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from datasets import Audio
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, set_seed
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.inputs.columns import file_column, label_column
from hf_teleport.inputs.models import from_saved
from hf_teleport.tasks.arguments import FolderDataArguments, ModelArguments, parse
from hf_teleport.tasks.image_classification import accuracy
from hf_teleport.tasks.labels import Labels
from hf_teleport.tasks.model import make_config, make_model
from hf_teleport.tasks.run import run
from hf_teleport.tasks.sound import decode, resample, sound_folders
from hf_teleport.tasks.tables import load_tables


@dataclass
class AudioArguments(FolderDataArguments):
    """Columns of sounds and labels, and the length of sounds."""

    audio_column_name: str | None = field(
        default=None, metadata={"help": "Column of sounds. Default: the first column of sounds."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of classes. Default: the first of the type ClassLabel, or 'label'."}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the feature extractor. Default: model_name_or_path."}
    )
    max_length_seconds: float = field(
        default=20.0, metadata={"help": "Cut longer sounds, in training to a random piece, in evaluation to their beginning."}
    )


def feature_extractor(model_args: ModelArguments, data_args: AudioArguments, config: Any) -> Any:
    """The saved feature extractor, or a new one that suits the config.

    Raises:
        ValueError: no model with this config takes sounds.
    """
    name = data_args.feature_extractor_name or model_args.model_name_or_path
    if name:
        argument = "feature_extractor_name" if data_args.feature_extractor_name else "model_name_or_path"
        return from_saved(AutoFeatureExtractor.from_pretrained, argument, name, revision=model_args.model_revision)
    if type(config) not in FEATURE_EXTRACTOR_MAPPING:
        raise ValueError(
            f"config_name = {config.model_type!r} is not allowed; allowed: one with a feature extractor: wav2vec2, ..."
        )
    return FEATURE_EXTRACTOR_MAPPING[type(config)]()


def main(argv: list[str]) -> dict[str, float]:
    """Run the task with the arguments of a command line. Returns its metrics."""
    kinds = (ModelArguments, AudioArguments, TeleportTrainingArguments)
    model_args, data_args, training_args = parse("audio_classification", kinds, argv, __doc__)
    set_seed(training_args.seed)
    # Trainer drops columns that the model does not take, so it would drop the sounds before they become features.
    training_args.remove_unused_columns = False

    def check(rows: Any, source: str) -> str:
        column = file_column(rows, data_args.audio_column_name, Audio, source)
        label_column(rows, data_args.label_column_name, source)
        return column

    with training_args.main_process_first(desc="data"):
        tables = load_tables(data_args, check, training_args.seed, sound_folders)
    audio = check(tables["train"], "the training rows")
    labels = Labels.of(tables["train"], data_args.label_column_name)
    # Without decoding, because `datasets` decodes by torchcodec, which needs ffmpeg.
    tables = tables.cast_column(audio, Audio(decode=False)).select_columns([audio, labels.column])
    config = make_config(model_args, **labels.settings)
    extractor = feature_extractor(model_args, data_args, config)
    rate = extractor.sampling_rate
    longest = int(data_args.max_length_seconds * rate)

    def waves(rows: dict[str, list[Any]], at_random: bool) -> dict[str, list[Any]]:
        decoded = [resample(*decode(sound), rate) for sound in rows[audio]]
        # By torch's generator, so that a teleport batch is the same when it is drawn again.
        starts = [int(torch.randint(max(1, len(w) - longest + 1), ())) if at_random else 0 for w in decoded]
        cut = [wave[start : start + longest] for wave, start in zip(decoded, starts, strict=True)]
        return {"wave": cut, "labels": labels.numbers(rows[labels.column])}

    # Extractors that pad to a fixed length by default (Whisper's) keep their own padding.
    padding = signature(extractor.__call__).parameters.get("padding")
    settings: dict[str, Any] = {"padding": True} if padding is not None and not padding.default else {}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        features = extractor([row["wave"] for row in rows], sampling_rate=rate, return_tensors="pt", **settings)
        return {**features, "labels": torch.tensor([row["labels"] for row in rows])}

    for name, rows in tables.items():
        rows.set_transform(partial(waves, at_random=name == "train"))
    trainer = TeleportTrainer(
        model=make_model(AutoModelForAudioClassification, model_args, config),
        args=training_args,
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=extractor,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    return run(trainer, model_args, data_args)
