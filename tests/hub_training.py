"""Trainings that push to a Hub, for test_card.py: a process of its own, for `huggingface_hub` reads HF_ENDPOINT when imported.

    python hub_training.py FOLDER

Writes FOLDER/results.json, and the weights and an output of each trained model as FOLDER/NAME.pt.
"""

import json
import sys
from concurrent.futures import wait
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_teleport import TeleportConfig, TeleportTrainer
from hf_teleport.journal import JOURNAL


class Patient(TrainerCallback):
    """Waits for each push of a checkpoint, which Trainer else leaves out while the last one is on its way."""

    trainer: Trainer

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.push_in_progress is not None:
            wait(self.trainer.push_in_progress.jobs)


class StopAt(TrainerCallback):
    """An interruption, after the checkpoint of this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def vit():
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4))


def tied_llama():
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 29}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": torch.tensor(i % 4)} for i in range(16)]


def texts():
    return [{"input_ids": (torch.arange(7) * i) % 29, "labels": (torch.arange(7) * i) % 29} for i in range(16)]


def trainer(folder, name, model, rows, steps=None, callbacks=(), **settings):
    """A trainer of four steps with checkpoints after two and four: `TeleportTrainer`, or Trainer if `steps` is None."""
    arguments = TrainingArguments(
        str(folder / name),
        hub_model_id=name,
        push_to_hub=True,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    patient = Patient()
    common = {"args": arguments, "train_dataset": rows, "callbacks": [patient, *callbacks]}
    if steps is None:
        made = Trainer(model, **common)
    else:
        turned = {"method": "basis", "blocking_gains": "hold"}
        method = turned if isinstance(model, LlamaForCausalLM) else {"method": "null_space"}
        config = TeleportConfig(steps=steps, num_batches=1, batch_size=2, **method)
        made = TeleportTrainer(model, teleport_config=config, **common)
    patient.trainer = made
    return made


def keep(folder, name, model, row):
    inputs = {key: value[None] for key, value in row.items() if key != "labels"}
    with torch.no_grad():
        output = model.eval()(**inputs).logits
    torch.save({"inputs": inputs, "output": output, "weights": model.state_dict()}, folder / f"{name}.pt")


def strategies(folder):
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        run = trainer(folder, strategy, vit(), images(), steps=[1], hub_strategy=strategy, hub_private_repo=strategy == "end")
        run.train()
        # Both ways in which a user pushes; either makes the card.
        run.save_model() if strategy == "every_save" else run.push_to_hub(tags="digits")
        keep(folder, strategy, run.model, images()[0])


def tied(folder):
    run = trainer(folder, "tied", tied_llama(), texts(), steps=[1])
    run.train()
    run.push_to_hub()
    keep(folder, "tied", run.model, texts()[1])
    return {"turned": sum(not symmetry.reason for symmetry in run.teleport_reports[0].symmetries)}


def resumed(folder):
    settings = {"rows": images(), "steps": [1, 3], "hub_strategy": "checkpoint"}
    trainer(folder, "resumed", vit(), callbacks=[StopAt(2)], **settings).train()
    files = snapshot_download("somebody/resumed", allow_patterns="last-checkpoint/*")
    run = trainer(folder / "later", "resumed", vit(), **settings)
    run.train(resume_from_checkpoint=f"{files}/last-checkpoint")
    run.push_to_hub()
    return {"reports": len(run.teleport_reports)}


def broken(folder, name, steps):
    """What becomes of a run when the Hub refuses its commits."""
    run = trainer(folder, name, vit(), images(), steps=steps, hub_strategy="every_save")
    run.train()
    try:
        run.push_to_hub()
        error = "none"
    except Exception as raised:
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0].replace(name, 'NAME').split(' (')[0]}"
    files = sorted(path.name for path in Path(run.args.output_dir).iterdir() if path.name != JOURNAL)
    return {"steps": run.state.global_step, "error": error, "files": files}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    strategies(out)
    results = {
        "tied": tied(out),
        "resumed": resumed(out),
        "broken_plain": broken(out, "broken_plain", None),
        "broken_teleport": broken(out, "broken_teleport", [1]),
    }
    (out / "results.json").write_text(json.dumps(results))
