"""Runs of which the batches are looked at: those of training, and those that events get."""

import torch

from hf_teleport import TeleportTrainer

from tiny_runs import assert_moved, flat, make, teleports


class Recording:
    """Mixed into a trainer: the batches that it trains on, and those that events get."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def _draw(self, count, event):
        drawn = super()._draw(count, event)
        self.__dict__.setdefault("drawn", []).append(drawn)
        return drawn


def run(folder, mixin=object, made=None, config=None, off=False, **settings):
    """A trained trainer, whose class is made of some more."""
    bases = [base for base in (Recording, mixin, TeleportTrainer) if base is not object]
    config = teleports(**{"method": "null_space", "steps": [1], **(config or {}), **({"steps": []} if off else {})})
    trainer = make(folder, config=config, made=made, trainer_class=type("Tried", tuple(bases), {}), max_steps=4, **settings)
    trainer.train()
    return trainer


def assert_as_without(tmp_path, mixin=object, made=dict, events=1, config=None, **settings):
    """There was an event, and training saw what it sees without one. Returns the run.

    Args:
        made: makes what the trainer gets, anew for each run.
    """
    plain = run(tmp_path, mixin, made(), off=True, **settings)
    trainer = run(tmp_path, mixin, made(), config=config, **settings)
    assert trainer.seen == plain.seen
    if events:
        assert_moved(trainer, events)
    else:
        assert torch.equal(flat(trainer.model), flat(plain.model))
    return trainer


def rows_of(drawn):
    return [row for batch in (*drawn.batches, drawn.held_back) for row in batch["input_ids"].tolist()]


def own_loader(make_loader):
    """A mixin whose loader is made once, and a counter of the calls."""

    class OwnLoader:
        calls = 0

        def get_train_dataloader(self):
            type(self).calls += 1
            return make_loader()

    return OwnLoader
