"""Train the runs of an experiment one after the other. Each has a folder, and a finished run is not trained again.

During a run its folder has `settings.json` and Trainer's checkpoints. A finished run has `history.json`, `done` and, if the
settings ask for it, its trained model in `model`.
"""

import json
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed

from hf_teleport.lab.arguments import given
from hf_teleport.lab.data import Pipeline
from hf_teleport.lab.history import History
from hf_teleport.lab.optimizers import make_optimizer
from hf_teleport.lab.settings import Experiment, Run
from hf_teleport.lab.workload import Workload, evenly
from hf_teleport.reporting.extras import require_extra
from hf_teleport.trainer import TeleportTrainer

SETTINGS, HISTORY, DONE, ALL_SETTINGS, MODEL = "settings.json", "history.json", "done", "experiment.yaml", "model"


def execute(experiment: Experiment) -> int:
    """Train the unfinished runs, and return their number.

    Several processes (`accelerate launch`) train each run together, and the first one writes.

    Raises:
        FileNotFoundError, ValueError: the data can't be loaded, a run's folder was made with other settings, or a run fails.
        ModuleNotFoundError: a library of the experiments is not installed.
    """
    processes = PartialState()
    metrics = require_extra("hf_teleport.metrics")
    # One process decides, because the folder may change before another process looks.
    pending = from_first(lambda: _pending(experiment))
    if not pending:
        return 0
    if processes.is_main_process:
        experiment.output.mkdir(parents=True, exist_ok=True)
        _write(experiment.output / ALL_SETTINGS, yaml.safe_dump(experiment.settings, sort_keys=False))
    with processes.main_process_first():
        data = experiment.workload.data
    hidden = experiment.runs[0].training.disable_tqdm or not processes.is_main_process
    with tqdm(total=len(experiment.runs), initial=len(experiment.runs) - len(pending), unit="run", disable=hidden) as bar:
        for index in pending:
            run = experiment.runs[index]
            bar.set_description(str(run))
            bar.set_postfix_str("")
            try:
                _carry_out(run, experiment.workload, data, metrics.trainer_arguments(data.measure), bar)
            except ValueError as error:
                raise ValueError(f"{run}: {error}") from error
            bar.update()
    return len(pending)


def from_first(read: Callable[[], Any]) -> Any:
    """Read a value on the first process and send it to all, because the others may not see the same files."""
    processes = PartialState()
    found = [read() if processes.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def _pending(experiment: Experiment) -> list[int]:
    """The indices of the unfinished runs.

    Raises:
        ValueError: a folder was made with other settings.
    """
    for run in experiment.runs:
        if (run.folder / SETTINGS).exists():
            _require_same(run, json.loads((run.folder / SETTINGS).read_text()))
    return [index for index, run in enumerate(experiment.runs) if not (run.folder / DONE).exists()]


def _require_same(run: Run, old: dict[str, Any]) -> None:
    nothing = object()
    for key in {**old, **run.settings}:
        before, now = old.get(key, nothing), run.settings.get(key, nothing)
        if before != now:
            there, here = ("not given" if value is nothing else repr(value) for value in (before, now))
            raise ValueError(
                f"{key} = {here} is not allowed; allowed: {there}, because {run.folder} was made with it. Give the same "
                "settings or another output_dir, or delete that folder."
            )


def _carry_out(run: Run, workload: Workload, data: Pipeline, measures: dict[str, Any], bar: Any) -> None:
    """Train a run and write its history. An interrupted run goes on from its last checkpoint."""
    processes = PartialState()
    if processes.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        _write(run.folder / SETTINGS, json.dumps(run.settings, indent=1))
        _remove_unfinished(run.folder)
    processes.wait_for_everyone()
    checkpoint = max(_checkpoints(run.folder), key=_step, default=None)
    history = History() if checkpoint is None else History.from_state(_state(checkpoint).stateful_callbacks["History"])
    trainer = make_trainer(run, workload, data, measures)
    trainer.add_callback(history)
    trainer.add_callback(_Progress(bar))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not any("eval_test_loss" in row and row["step"] == trainer.state.global_step for row in history.rows):
        trainer.evaluate()
    if run.save_model:
        trainer.save_model(str(run.folder / MODEL))
        if data.tokenizer is not None and processes.is_main_process:
            data.tokenizer.save_pretrained(run.folder / MODEL)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _write(run.folder / HISTORY, json.dumps(history.rows))
        for path in _checkpoints(run.folder):
            shutil.rmtree(path)
        (run.folder / DONE).touch()


def make_trainer(run: Run, workload: Workload, data: Pipeline, measures: dict[str, Any]) -> TeleportTrainer:
    """Make a run's trainer. The seed decides the initial weights.

    Args:
        measures: a Trainer's `compute_metrics` and `preprocess_logits_for_metrics`.
    """
    set_seed(run.seed)
    model = workload.make_model(data)
    train = evenly(data.train, workload.train_rows)
    # The bar over the runs replaces Trainer's own. The change is made in a copy, because callers read the original.
    training = copy(run.training)
    training.disable_tqdm = True
    trainer = TeleportTrainer(
        model,
        training,
        train_dataset=train,
        eval_dataset={
            "train": data.fixed(evenly(train, workload.train_loss_rows)),
            "test": data.fixed(evenly(data.test, workload.test_rows)),
        },
        data_collator=data.collator(run.seed),
        # Trainer calls the function without arguments, and gets the function that makes the optimizer.
        optimizer_cls_and_kwargs=(lambda: make_optimizer, {"arguments": training}) if given(training) else None,
        **measures,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):
    """Shows the run's steps and loss beside the bar over the runs."""

    def __init__(self, bar: Any):
        self._bar = bar

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix_str(f"step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.4g}")


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint-*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _remove_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints. They lack the trainer state, which Trainer writes last."""
    for path in _checkpoints(folder):
        try:
            _state(path)
        except (OSError, ValueError):
            shutil.rmtree(path)


def _write(path: Path, text: str) -> None:
    """Write a new file and rename it, so that an interrupt leaves either the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
