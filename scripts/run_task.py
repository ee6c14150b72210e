"""Train one task, with teleportation before scheduled steps or epochs, and write the run's log.

    python scripts/run_task.py configs/ptb_llama.yaml --learning_rate 3e-3 --history runs/ptb.json
    python scripts/run_task.py configs/sst2_bert_mlm.yaml && python scripts/run_task.py configs/sst2_bert.yaml
    python scripts/run_task.py --task lm --dataset ../shared/data/ptb --output_dir runs/lm --max_steps 100 --soap true

A YAML file sets any argument, and what stands on the command line after it wins. The seed alone decides the initial weights
and the order of the data. Losses named train and test are of fixed rows, in eval mode.
"""

import json
import sys
from pathlib import Path
from typing import Any

from run_image_classification import parse
from tasks import TASKS, Masking, Task, TaskArguments
from torch.utils.data import Dataset, Subset
from transformers import set_seed

from hf_teleport import TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import TensorRows
from hf_teleport.lab.history import History


def evenly(rows: Any, count: int) -> Dataset:
    """So many rows, evenly spread over the set."""
    return Subset(rows, range(len(rows))[:: max(1, len(rows) // count)][:count])


def fixed(rows: Any, task: Task) -> Dataset:
    """The rows as they are evaluated: words that a collator masks at random are masked once, the same in every run."""
    if not isinstance(task.collator, Masking):
        return rows
    return TensorRows(**Masking(task.tokenizer, seed=0)([rows[i] for i in range(len(rows))]))


def soap(arguments: TaskArguments, training: TeleportTrainingArguments) -> tuple[type, dict[str, Any]]:
    """The optimizer SOAP and its settings; weight decay comes with the parameter groups."""
    # Here, because the import takes seconds.
    from pytorch_optimizer import SOAP

    settings = {
        "lr": training.learning_rate,
        "precondition_frequency": arguments.soap_precondition_frequency,
        "max_precondition_dim": arguments.soap_max_precondition_dim,
    }
    return SOAP, settings


def make_trainer(arguments: TaskArguments, training: TeleportTrainingArguments) -> TeleportTrainer:
    """A trainer with a fresh model."""
    if training.data_seed is None:
        # Otherwise the order of the data depends on how many random numbers the initial weights took.
        training.data_seed = training.seed
    task = TASKS[arguments.task](arguments, training.seed)
    set_seed(training.seed)
    return TeleportTrainer(
        task.make_model(),
        training,
        train_dataset=task.train,
        eval_dataset={
            "train": fixed(evenly(task.train, arguments.train_loss_rows), task),
            "test": fixed(evenly(task.test, arguments.test_loss_rows), task),
        },
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=task.metrics,
        optimizer_cls_and_kwargs=soap(arguments, training) if arguments.soap else None,
    )


def main(argv: list[str]) -> None:
    arguments, training = parse(argv, TaskArguments)
    trainer = make_trainer(arguments, training)
    history = History()
    trainer.add_callback(history)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    scored = [row["step"] for row in history.rows if "eval_test_loss" in row]
    if trainer.state.global_step not in scored:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        if arguments.history:
            Path(arguments.history).write_text(json.dumps(history.rows))
        scores = {name: value for row in history.rows for name, value in row.items() if name.startswith("eval_")}
        for name in [name for name in scores if name.endswith(("_loss", "_accuracy"))]:
            print(f"{name:30} {scores[name]:.4f}")
        print(f"{'cpu_seconds':30} {history.rows[-1]['cpu_seconds']:.1f}")
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
