"""Training that ends itself with SIGKILL, and goes on from its last checkpoint when it is started again."""

import os
import shutil
import signal
from itertools import count
from pathlib import Path

import torch
import transformers.modeling_utils
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from hf_teleport import TeleportConfig, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.event import event
from hf_teleport.layers.layer import Layer
from hf_teleport.methods import BasisTurn, NullSpace
from hf_teleport.methods.basis import turn
from hf_teleport.methods.null_space import direction
from hf_teleport.optimizers.state import OptimizerState
from hf_teleport.weights.snapshot import Snapshot

import forks

VOCAB = 29

# Two epochs of 6 steps, a checkpoint after every second, and in each epoch an event: one in the middle of it, one at its start.
STEPS, EVENTS, SAVE_STEPS = 12, (3, 6), 2

# What is done and in which of its calls in an event, or while a checkpoint is saved.
PHASES = {
    "measured_before": (NullSpace, "survey", 2),
    "decomposed": (NullSpace, "fit", 1),
    "weights_copied": (Snapshot, "__init__", 2),
    "weights_shifted": (direction, "_forward", 1),  # they are elsewhere for as long as it lasts
    "half_a_step": (Layer, "add_", 2),
    "shortened": (event, "shorten", 1),
    "null_space_kept": (event.Event, "_keep", 1),
    "logged_between_methods": (Trainer, "log", 1),
    "basis_chosen": (BasisTurn, "fit", 1),
    "half_a_turn": (turn, "_turn", 5),
    "optimizer_half_turned": (OptimizerState, "turn", 5),
    "reviewed": (BasisTurn, "review", 1),
    "basis_kept": (event.Event, "_keep", 2),
    "logged": (Trainer, "log", 2),
}
WRITERS = {
    "weights": (transformers.modeling_utils, "safe_save_file"),
    "optimizer": (torch, "save"),
    "state": (TrainerState, "save_to_json"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in(owner, name, at):
    """Let a function's call of this number be the last thing that this process does."""
    real, calls = getattr(owner, name), count(1)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == at:
            die()
        return result

    setattr(owner, name, wrapped)


def dying_writing(owner, name):
    """Let a file be cut in the middle."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        real(*args, **kwargs)
        path = next(Path(value) for value in args if isinstance(value, (str, Path)))
        os.truncate(path, path.stat().st_size // 2)
        die()

    setattr(owner, name, wrapped)


class Killed(TeleportTrainer):
    """Dies in an event before a step, in one of its phases."""

    at, phase = None, None

    def teleport(self):
        if self.state.global_step == self.at:
            dying_in(*PHASES[self.phase])
        return super().teleport()


class Killer(TrainerCallback):
    """Dies at the end of a step, right after a checkpoint, or while one is written."""

    def __init__(self, when, at, writer=None):
        self.when, self.at, self.writer = when, at, writer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at and self.when == "step":
            die()
        if state.global_step == self.at and self.when == "saving":
            dying_writing(*WRITERS[self.writer])

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.at and self.when == "saved":
            die()


class Counting(TrainerCallback, ExportableState):
    """Has a state of its own: how many steps it has seen."""

    def __init__(self, steps=0):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {"steps": self.steps}, "attributes": {}}


def trainer(folder, kind=TeleportTrainer, callbacks=(), **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.2, use_cache=False))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, VOCAB, (24, 8))]
    args = TeleportTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    config = TeleportConfig(
        method="null_space+basis", epochs=2, warmup_steps=EVENTS[0], num_batches=2, batch_size=1, steps_per_batch=2
    )
    return kind(model, args, train_dataset=rows, teleport_config=config, callbacks=[*callbacks, Counting()])


def remove_unfinished_checkpoints(folder):
    """As a user must: Trainer takes the last checkpoint for whole. It writes the state last."""
    for path in Path(folder).glob("checkpoint-*"):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):
            shutil.rmtree(path)


def train(folder, kill=None, **settings):
    """Train from the last checkpoint if there is one, and keep what came of it.

    Args:
        kill: where to die: ("event", step, phase), or the arguments of `Killer`.
    """
    forks.quick_collection()
    torch.set_num_threads(1)
    kind, callbacks = TeleportTrainer, []
    if kill is not None and kill[0] == "event":
        kind = type("Dying", (Killed,), {"at": kill[1], "phase": kill[2]})
    elif kill is not None:
        callbacks = [Killer(*kill)]
    run = trainer(folder, kind, callbacks, **settings)
    remove_unfinished_checkpoints(folder)
    checkpoints = [int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*")]
    run.train(resume_from_checkpoint=bool(checkpoints))
    optimizer = [value for p in run.model.parameters() for value in run.optimizer.state[p].values()]
    history = [{name: value for name, value in entry.items() if "seconds" not in name} for entry in run.state.log_history]
    counted = next(callback.steps for callback in run.callback_handler.callbacks if isinstance(callback, Counting))
    found = {
        "weights": [p.detach() for p in run.model.parameters()],
        "optimizer": optimizer,
        "history": [entry for entry in history if "train_runtime" not in entry],
        "from": max(checkpoints, default=0),
        "events": len(run.teleport_reports),
        "counted": counted,
    }
    torch.save(found, Path(folder) / "found.pt")
