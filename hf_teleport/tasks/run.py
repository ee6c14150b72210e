"""The steps of every task after its trainer is made: train, save, evaluate, and report."""

import math
import re
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from hf_teleport.tasks.arguments import ModelArguments


def run(trainer: Any, model: ModelArguments, data: Any, *, perplexity: bool = False, **evaluation: Any) -> dict[str, float]:
    """Train from the last checkpoint or from the beginning, save, evaluate, and write the metrics and the model card.

    As in the Transformers examples, `train_results.json`, `eval_results.json` and `all_results.json` are written to `output_dir`
    beside the model. With only `do_eval` nothing is trained.

    Args:
        trainer: the task's trainer.
        model: the task's arguments for the model, for the model card.
        data: the task's arguments for the data, with `dataset_name` and `dataset_config_name` for the model card.
        perplexity: whether to report the perplexity. The loss must be a mean over tokens, in nats.
        evaluation: more arguments of `trainer.evaluate`.

    Returns:
        The metrics of training and evaluation.

    Raises:
        FileNotFoundError: `resume_from_checkpoint` is not a folder.
        ValueError: the checkpoint does not fit the model.
    """
    training = trainer.args
    measured: dict[str, float] = {}
    if training.do_train or not (training.do_eval and training.eval_strategy == "no"):
        result = _trained(trainer, checkpoint_of(training))
        trainer.save_model()
        trainer.save_state()
        measured |= _written(trainer, "train", result.metrics | {"train_samples": len(trainer.train_dataset)})
    scores = trainer.evaluate(**evaluation)
    if perplexity:
        scores["perplexity"] = math.exp(min(scores["eval_loss"], 700.0))  # a larger loss overflows
    measured |= _written(trainer, "eval", scores | {"eval_samples": len(trainer.eval_dataset)})
    # A card can't link to local folders.
    base, source = (name if name and not Path(name).exists() else None for name in (model.model_name_or_path, data.dataset_name))
    told = {"finetuned_from": base, "dataset_tags": source, "dataset_args": data.dataset_config_name}
    trainer.push_to_hub(**told) if training.push_to_hub else trainer.create_model_card(**told)
    return measured


def checkpoint_of(training: Any) -> str | None:
    """The checkpoint to resume from: the one that was given, or else the last in `output_dir`. None: start anew.

    Raises:
        FileNotFoundError: the given checkpoint does not exist.
    """
    asked = training.resume_from_checkpoint
    if str(asked).lower() == "false":
        return None
    if asked and str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise FileNotFoundError(
                f"resume_from_checkpoint = {asked!r} is no folder; allowed: a checkpoint's folder, true (the default: the last "
                "one in output_dir), or false to begin anew."
            )
        return str(asked)
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if last and training.process_index == 0:
        print(f"Resuming from {last}. To begin anew, pass --resume_from_checkpoint false, or another --output_dir.")
    return last


def _trained(trainer: Any, checkpoint: str | None) -> Any:
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except (RuntimeError, ValueError) as error:
        # These words are in torch's errors about a module's or an optimizer's state.
        if checkpoint is None or not re.search("loading state_dict|loaded state dict", str(error)):
            raise
        raise ValueError(
            f"{checkpoint} belongs to another model or optimizer. To begin anew, pass --resume_from_checkpoint false, or another "
            "--output_dir."
        ) from error


def _written(trainer: Any, split: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics
