"""Batches with nothing to learn from are no data, and losses are weighted by their items as in training."""

import math

import pytest
import torch
from transformers import Trainer

from hf_teleport import TeleportTrainer
from hf_teleport.event.batches import num_items

from drawn_runs import rows_of, run
from tiny_runs import Texts, llama, make, pad, teleports

# All batches of an event, whatever it costs and training has told.
OF_AUTO = {"auto": {"budget": None, "track_every": 0}, "null_space": {}}


class Padded(Texts):
    """Rows of which only a few have labels."""

    def __init__(self, learn, **settings):
        super().__init__(**settings)
        for i, row in enumerate(self.rows):
            if i not in learn:
                row["labels"] = torch.full_like(row["input_ids"], -100)


@pytest.mark.parametrize("method", ["auto", "null_space"])
def test_a_batch_without_labels_is_no_data(tmp_path, caplog, method):
    caplog.set_level("INFO", logger="hf_teleport")
    learn = [0, 1, 2, 3, 4]
    trainer = run(
        tmp_path,
        made={"train_dataset": Padded(learn)},
        config={"method": method, "steps": [2], "batch_size": 1, **OF_AUTO[method]},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    (report,) = trainer.teleport_reports
    assert (report.method, report.stopped_because) == ("basis" if method == "auto" else "null_space", "steps_done")
    assert "batches with no label to learn from were passed over" in caplog.text
    known = [Texts().rows[i]["input_ids"].tolist() for i in learn]
    assert all(row in known for row in rows_of(trainer.drawn[-1]))
    assert trainer.drawn[-1].left_out > 0


def test_where_no_row_has_a_label_training_goes_on(tmp_path, caplog):
    trainer = run(tmp_path, made={"train_dataset": Padded([]), "teleport_dataset": None})
    assert trainer.state.global_step == 4
    assert trainer.teleport_reports[0].stopped_because == "non_finite"


@pytest.mark.parametrize(
    ("batch", "shifted", "count"),
    [
        ({"labels": torch.tensor([[1, -100, 2]])}, False, 2),
        ({"labels": torch.tensor([[1, -100, 2]])}, True, 1),
        ({"labels": torch.tensor([[1, -100, -100]])}, True, 0),
        ({"labels": torch.tensor([[1, 2]]), "shift_labels": torch.tensor([[2, -100]])}, True, 1),
        ({"labels": torch.tensor([0.5, -100.0])}, False, None),
        ({"labels": torch.tensor([1, -100])}, False, 1),
        ({"labels": [torch.tensor([1])]}, False, None),
        ({"input_ids": torch.tensor([[1]])}, False, None),
        ((torch.tensor([1]), torch.tensor([-100])), False, None),
    ],
)
def test_items(batch, shifted, count):
    assert num_items(batch, shifted) == count


class Masked:
    """A loss of its own: a mean over a mask that labels say nothing of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = -model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        mask = inputs["input_ids"][:, :1] % 3 == 0  # rows that count
        return (losses * mask).sum() / (mask.sum() * losses.shape[1])


@pytest.mark.parametrize("method", ["auto", "null_space"])
def test_the_mean_over_no_items_of_a_loss_of_ones_own(tmp_path, caplog, method):
    config = {"method": method, "steps": [2], "batch_size": 1, "num_batches": 8, **OF_AUTO[method]}
    trainer = run(tmp_path, Masked, {"train_dataset": Texts()}, config, per_device_train_batch_size=8)
    counted = [int(batch["input_ids"][0, 0]) % 3 == 0 for batch in trainer.drawn[-1].batches]
    assert 0 < sum(counted) < 8
    assert f"{8 - sum(counted)} of 8 teleport batches were left out" in caplog.text
    (report,) = trainer.teleport_reports
    assert report.steps
    assert report.method == ("basis" if method == "auto" else "null_space")


class Pairs:
    """Batches that are tuples, whose labels nobody can count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs[0], labels=inputs[1]).loss


def as_pairs(rows):
    batch = pad(rows)
    return batch["input_ids"], batch["labels"]


def test_an_event_of_a_single_batch_draws_another_if_its_loss_is_no_number(tmp_path, caplog):
    config = teleports("basis", steps=[1, 2, 3], num_batches=16, batch_size=1)
    made = {"train_dataset": Padded(range(1, 32, 3), count=32), "data_collator": as_pairs}
    own = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4}
    trainer = make(tmp_path, config=config, trainer_class=type("Tried", (Pairs, TeleportTrainer), {}), made=made, **own)
    trainer.train()
    assert len(trainer.teleport_reports) == 3
    assert all(report.steps and not math.isnan(report.loss_before) for report in trainer.teleport_reports)
    assert "teleport batches were left out" in caplog.text


def test_losses_of_batches_are_weighted_by_their_items_as_in_training(tmp_path):
    rows = Padded([], count=18)
    for i, row in enumerate(rows.rows):
        row["labels"][1 : 2 + i % 5] = row["input_ids"][1 : 2 + i % 5]
    config = {"num_batches": 6, "steps": [0]}
    trainer = make(tmp_path, llama(), teleports("null_space", **config), made={"train_dataset": rows}, max_steps=1)
    model, batches = trainer.model.eval(), trainer._draw(6, event=0).batches
    counts = [num_items(batch, shifted=True) for batch in batches]
    assert len(set(counts)) > 1
    with torch.no_grad():
        total = sum(float(model(**batch).loss) * count for batch, count in zip(batches, counts, strict=True))
    trainer.train()
    (report,) = trainer.teleport_reports
    assert report.loss_before == pytest.approx(total / sum(counts), rel=1e-5)


def test_of_equal_batches_the_loss_is_plain_trainers_to_the_last_bit(tmp_path):
    class Equal(Texts):
        def __init__(self):
            super().__init__()
            self.rows = [{name: torch.arange(8) + i for name in ("input_ids", "labels")} for i in range(18)]

    trainer = make(tmp_path, made={"train_dataset": Equal()})
    (batch,) = trainer._draw(1, event=0).batches
    _, count = Trainer.get_batch_samples(trainer, iter([batch]), 1, torch.device("cpu"))
    plain = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    assert torch.equal(trainer._teleport_loss(trainer.model, batch), plain)
