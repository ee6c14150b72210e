"""TeleportTrainer under FSDP2 as Accelerate sets it up, on two gloo processes: against DDP and Trainer, saved, resumed."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_teleport import TeleportConfig, TeleportTrainer
from hf_teleport.journal import read
from hf_teleport.layers.double import keeping_double
from hf_teleport.weights.shards import Shards

from ranks import VOCAB, flat, fsdp2_of_accelerate, llama, run

_NULL_SPACE = {"method": "null_space", "num_batches": 1, "batch_size": 2, "steps_per_batch": 2}
_RESET = {"optimizer_state": "reset"}

# Settings, precision, the largest relative difference, and how a checkpoint is written if the run is also resumed from it.
CASES = {
    "default": ({}, torch.float32, 1e-6, "FULL_STATE_DICT"),
    "null_space": ({**_NULL_SPACE, "steps": [1, 3]}, torch.float32, 1e-6, "SHARDED_STATE_DICT"),
    "null_space, reset": ({**_NULL_SPACE, **_RESET, "steps": [2]}, torch.float64, 1e-12, None),
    "basis, reset": ({"method": "basis", "steps": [2], **_RESET}, torch.float64, 1e-12, None),
}
EVENTS = {
    "default": [(2, "basis")],
    "null_space": [(1, "null_space"), (3, "null_space")],
    "null_space, reset": [(2, "null_space")],
    "basis, reset": [(2, "basis")],
}
RESUMED = [name for name, (*_, saved) in CASES.items() if saved]

_TIMES = ("runtime", "per_second", "seconds")


def trained(folder, settings, dtype=torch.float32, fsdp=True, saved=None, start=None):
    """A trainer after four steps, and what is to be known of it.

    Args:
        settings: those of the teleports; None: a plain Trainer.
        saved: how the checkpoint after two steps is written; None: there is none.
        start: the checkpoint to go on from.
    """
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, VOCAB, (32, 8), generator=generator)]
    config = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": saved or "FULL_STATE_DICT"}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        adam_epsilon=1e-4,  # so that no step is mere rounding where a gradient is next to nothing
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="steps" if saved else "no",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        **({"fsdp": True, "fsdp_config": config} if fsdp else {"use_cpu": True}),
    )
    made = {"model": llama(dtype), "args": args, "train_dataset": rows}
    trainer = Trainer(**made) if settings is None else TeleportTrainer(**made, teleport_config=TeleportConfig(**settings))
    with keeping_double(trainer.model.parameters()):  # or Llama's casts would make a jump of the last digit's rounding
        trainer.train(resume_from_checkpoint=start)
    history = [{k: v for k, v in row.items() if not k.endswith(_TIMES)} for row in trainer.state.log_history]
    return trainer, {
        "weights": flat(trainer.model),
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "history": [row for row in history if "train_loss" not in row],  # of a resumed run it is another one
    }


def scenes(rank, size, folder):
    """What comes of every case, and how many modules are whole at once in its events."""
    found = {}
    opened = []
    make_whole = Shards._make_whole

    def watched(self, unit):
        make_whole(self, unit)
        opened.append(len(self._open))

    for name, (settings, dtype, _, saved) in CASES.items():
        _, found["ddp", name] = trained(folder / "ddp", settings, dtype, fsdp=False)
        with fsdp2_of_accelerate(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shards, "_make_whole", watched)
            opened.clear()
            trainer, found["fsdp", name] = trained(folder / name, settings, dtype, saved=saved)
            found["fsdp", name]["most"] = max(opened, default=0)
            if saved:
                trainer.save_model(str(folder / name / "saved"))
                start = str(folder / name / "checkpoint-2")
                _, found["resumed", name] = trained(folder / name, settings, dtype, saved=saved, start=start)
    with fsdp2_of_accelerate():
        _, found["plain"] = trained(folder / "plain", None)
        _, found["off"] = trained(folder / "off", {"epochs": 0})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def both(folder):
    return run(scenes, 2, folder, folder)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def events(found):
    return [(row["step"], row["teleport/method"]) for row in found["history"] if "teleport/steps" in row]


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_ends_where_that_of_ddp_does(both, name):
    for each in both:
        sharded, whole = each["fsdp", name], each["ddp", name]
        assert sharded["sharded"]
        assert not whole["sharded"]
        assert relative(sharded["weights"], whole["weights"]) < CASES[name][2]
        assert events(sharded) == events(whole) == EVENTS[name]
        assert all(row["teleport/steps"] > 0 for row in sharded["history"] if "teleport/steps" in row)
        assert all(row["grad_norm"] > 0.5 for row in sharded["history"] if "grad_norm" in row), "every step is clipped"


@pytest.mark.parametrize("name", CASES)
def test_in_a_trainer_too_weights_stay_sharded(both, name):
    # The model's own weights, those outside of all layers, count as one more.
    assert {each["fsdp", name]["most"] for each in both} == {2}


def test_without_teleports_it_is_trainer(both):
    for each in both:
        assert each["plain"]["sharded"]
        assert torch.equal(each["off"]["weights"], each["plain"]["weights"])
        assert each["off"]["history"] == each["plain"]["history"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_the_whole_one(both, folder, name):
    for each in both:
        assert torch.equal(each["resumed", name]["weights"], each["fsdp", name]["weights"])
        assert each["resumed", name]["history"] == each["fsdp", name]["history"]
    journal = read(folder / name)
    assert journal["model"] == "LlamaForCausalLM"
    assert [event["step"] for event in journal["events"]] == [step for step, _ in EVENTS[name]]


def test_what_is_saved_loads_in_plain_transformers(both, folder):
    weights = both[0]["fsdp", "default"]["weights"]
    for saved in ("saved", "checkpoint-4"):
        assert torch.equal(flat(LlamaForCausalLM.from_pretrained(folder / "default" / saved)), weights)
