"""Two processes: what befalls one of them, and batches that cannot be shared out."""

import tempfile

import pytest
import torch

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import ImageTensors
from hf_teleport.weights.snapshot import Snapshot

from faulty import Scene, failing, images, mlp, out_of_memory, weights
from ranks import run


def on_two_ranks(rank, size):
    found = {"odd": odd_batches(size), "half": half_precision(size), "memory": memory_of_one(rank)}
    return {**found, "average": memory_of_one_for_an_average(rank)}


def in_parallel(model, rows, size, **settings):
    """A run with a teleport before its first step, on batches of 3. Returns its reports."""
    with tempfile.TemporaryDirectory() as folder:
        args = TeleportTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8 // size,
            num_train_epochs=1,
            learning_rate=0.1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            optim="sgd",
        )
        run = TeleportTrainer(
            model, args, train_dataset=rows, teleport_config=TeleportConfig(method="null_space", num_batches=2, batch_size=3)
        )
        sizes = []
        real = run._teleport_loss
        run._teleport_loss = lambda model, batch: (sizes.append(len(batch["labels"])), real(model, batch))[1]
        run.train()
        (report,) = run.teleport_reports
    return {"weights": weights(model), "steps": report.steps, "sizes": set(sizes), "reasons": [v.reason for v in report.layers]}


def odd_batches(size):
    return in_parallel(mlp(), images(), size)


def half_precision(size):
    data = images()
    return in_parallel(mlp().bfloat16(), ImageTensors(data.images.bfloat16(), data.labels), size)


def memory_of_one(rank):
    """What comes of an event if memory runs out in one process while it copies the weights."""
    scene = Scene()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            failing(patch, (Snapshot, "__init__", 2), out_of_memory())
        try:
            return scene.teleport().steps, weights(scene.model), ""
        except RuntimeError as error:
            return 0, weights(scene.model), str(error)


def memory_of_one_for_an_average(rank):
    """The same while it copies an average of the weights."""
    scene = Scene("basis")
    average = {name: parameter.detach().clone() for name, parameter in scene.model.named_parameters()}
    teleporter = Teleporter(scene.model, scene.config, optimizer=scene.optimizer)
    teleporter.register_average(average)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            failing(patch, (Snapshot, "__init__", 2), out_of_memory())
        steps = teleporter.teleport(scene.batches, scene.loss).steps
    return steps, weights(scene.model), torch.cat([tensor.flatten() for tensor in average.values()])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


def test_a_batch_that_cannot_be_shared_out_is_everybodys(two):
    first, second = (each["odd"] for each in two)
    assert first["sizes"] == second["sizes"] == {3}
    assert first["steps"] == second["steps"] > 0
    assert first["reasons"] == second["reasons"]
    assert torch.equal(first["weights"], second["weights"])


def test_weights_in_half_precision_stay_the_same_in_all_processes(two):
    first, second = (each["half"] for each in two)
    assert first["steps"] > 0
    assert torch.equal(first["weights"], second["weights"])


def test_memory_that_runs_out_in_one_process_while_it_copies_weights(two):
    first, second = (each["memory"] for each in two)
    assert first[2] == second[2] == ""
    assert first[0] == second[0] > 0
    assert torch.equal(first[1], second[1])


def test_memory_that_runs_out_in_one_process_while_it_copies_an_average(two):
    first, second = (each["average"] for each in two)
    assert first[0] == second[0] > 0
    for one, other in zip(first[1:], second[1:], strict=True):
        assert torch.equal(one, other)
