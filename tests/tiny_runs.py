"""Small data, small models and short runs, for tests that train."""

import datasets
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from hf_teleport import TeleportConfig, TeleportTrainer

VOCAB = 31


class Texts(Dataset):
    """Rows of unequal length, of which each token depends on the one before."""

    def __init__(self, count=18, seed=0, unused=False):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(6, 13, (count,), generator=generator).tolist()
        steps = [torch.randint(1, 4, (length,), generator=generator) for length in lengths]
        ids = [row.cumsum(0) % (VOCAB - 1) + 1 for row in steps]
        self.rows = [{"input_ids": row, "labels": row, **({"note": "text"} if unused else {})} for row in ids]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows, one after the other."""

    def __iter__(self):
        return iter(Texts().rows)


def hub_texts(unused=True):
    """The same rows as a data set of the library `datasets`."""
    rows = [
        {name: getattr(value, "tolist", lambda: "text")() for name, value in row.items()} for row in Texts(unused=unused).rows
    ]
    return datasets.Dataset.from_list(rows)


def pad(rows):
    """A collator."""
    fillings = {"input_ids": 0, "labels": -100}
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in fillings if name in rows[0]}
    batch = {name: nn.utils.rnn.pad_sequence(rows, True, fillings[name]) for name, rows in columns.items()}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, "vocab_size": VOCAB, "pad_token_id": 0, **settings}))


def gpt2(**settings):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCAB}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **settings}))


def arguments(folder, arguments_class=TrainingArguments, **settings):
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    return arguments_class(**{**defaults, **settings})


def flat(model):
    """All weights of a model."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- with a teleport ------------------------------------------------------------------------------------------------------

METHODS = ["null_space", "basis"]


def teleports(method="null_space+basis", **settings):
    """Settings of one small event, before the third step."""
    few = {"steps": [2], "num_batches": 2, "batch_size": 1} | ({} if method == "basis" else {"steps_per_batch": 2})
    return TeleportConfig(method=method, **{**few, **settings})


def make(folder, model=None, config=None, trainer_class=TeleportTrainer, made=None, args=None, **settings):
    """A trainer on texts.

    Args:
        made: arguments of the trainer, instead of the usual ones or beside them.
        args, settings: its training arguments, or some of them.
    """
    made = {"train_dataset": Texts(), "eval_dataset": Texts(7, seed=1), "data_collator": pad, **(made or {})}
    if "model_init" not in made:
        made["model"] = llama() if model is None else model
    return trainer_class(args=args or arguments(folder, **settings), teleport_config=config or teleports(), **made)


def assert_moved(trainer, events=1):
    """There were so many events, each with all methods, and all of them moved weights and kept the loss."""
    assert [report.method for report in trainer.teleport_reports] == trainer.teleport_config.method.split("+") * events
    for report in trainer.teleport_reports:
        assert report.steps > 0
        assert not report.rolled_back
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-4)


def moved(trainer):
    """Train, with one event."""
    trainer.train()
    assert_moved(trainer)
    return trainer


class Looking:
    """Mixed into a trainer: what `look` sees just before a teleport and just after it, and whether one goes on now."""

    inside = False

    def look(self):
        return None

    def teleport(self):
        before = self.look()
        self.inside = True
        report = super().teleport()
        self.inside = False
        self.looked = (before, self.look())
        return report


def looking(look, *bases):
    """A class of trainers."""
    return type("Looks", (Looking, *(bases or (TeleportTrainer,))), {"look": look})
