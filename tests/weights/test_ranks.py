"""Several gloo processes on shares of the data do what one process does on the whole."""

import io
import os
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import nn, optim
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import ImageTensors
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification
from hf_teleport.weights.ranks import Ranks, check_strategy

from ranks import flat, llama, mixtral, run, sharded, tokens
from tiny_models import VOCAB, loss_fn


def gpt2(dtype):
    """Wide enough for a null space of all batches together, and with biases."""
    torch.manual_seed(0)
    sizes = {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 16, "vocab_size": VOCAB}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)).to(dtype)


def trained(model, rank, size):
    """An optimizer that has seen a few batches, the gradients averaged as DDP does."""
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for batch in tokens(rank, size):
        loss_fn(model, batch).backward()
        for parameter in model.parameters():
            if size > 1 and parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# Every batch's null space is its own where a Llama of 32 would have none of three together at tau = 1. In float32 each of them
# takes up the rounding of the moves before it, by whatever Hessian.
CASES = {
    "fast32": (gpt2, torch.float32, {}, 1e-6),
    "fast32 by batch": (llama, torch.float32, {"scope": "batch"}, 5e-6),
    "exact32 by batch": (llama, torch.float32, {"scope": "batch", "hessian": "exact"}, 5e-6),
    "exact32": (llama, torch.float32, {"energy_threshold": 0.9, "hessian": "exact", "max_loss_change": None}, 1e-6),
    "fast": (llama, torch.float64, {"scope": "batch"}, 1e-12),
    "exact": (llama, torch.float64, {"energy_threshold": 0.9, "hessian": "exact", "max_loss_change": None}, 1e-12),
    "experts": (mixtral, torch.float64, {"scope": "batch", "hessian": "exact"}, 1e-12),
    "gradient": (llama, torch.float64, {"method": "basis"}, 1e-12),
    "gradient of heads": (gpt2, torch.float64, {"method": "basis"}, 1e-12),
    "activation": (llama, torch.float64, {"method": "basis", "basis": "activation"}, 1e-12),
    "measure": (llama, torch.float64, {"method": "basis", "second_moment": "measure"}, 1e-12),
    "level_set": (llama, torch.float64, {"method": "level_set"}, 1e-12),
    "lookahead": (llama, torch.float64, {"objective": "lookahead", "scope": "batch", "learning_rate": 1e-3}, 1e-12),
}
# The first ones stay sharded, the last three are gathered.
SHARDED = ["fast", "gradient", "fast32", "gradient of heads", "activation", "measure", "exact", "level_set", "lookahead"]


def teleported(name, rank, size, on_shards=False):
    """Weights after an event, and after some steps of training from there."""
    make, dtype, settings, _ = CASES[name]
    model = make(dtype)
    if on_shards:
        sharded(model, model.transformer.h if make is gpt2 else model.model.layers)
    # Experts that a process's tokens never reach get no gradient there: each process trains alike only without optimizer.
    # What is compared is the event: all come to it from the same weights.
    optimizer = None if make is mixtral else trained(model, 0, 1)
    method = settings.get("method", "null_space")
    config = TeleportConfig(**{"steps_per_batch": 2, **settings, "method": "auto"}).for_method(method)
    report = Teleporter(model, config, optimizer=optimizer).teleport(tokens(rank, size), loss_fn)
    assert report.steps > 0, name
    after = flat(model)
    if optimizer is not None:
        trained(model, rank, size)
    return {"weights": after, "later": flat(model), "loss": report.loss_after, "reasons": [v.reason for v in report.layers]}


def every_case(rank, size):
    torch.manual_seed(rank)  # what a process draws for itself does not matter
    found = {name: teleported(name, rank, size) for name in (CASES if size < 4 else ["exact", "gradient"])}
    if size > 1:
        names = SHARDED if size == 2 else SHARDED[:2]
        found |= {f"{name}, sharded": teleported(name, rank, size, on_shards=True) for name in names}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(every_case, 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_on_shares_equal_one_process_on_the_whole(alone, tmp_path, size):
    ranks = run(every_case, size, tmp_path)
    for name, first in ranks[0].items():
        expected = alone[name.split(",")[0]]
        tolerance = CASES[name.split(",")[0]][-1]
        for other in ranks[1:]:
            assert torch.equal(other[name]["weights"], first["weights"]), name
            assert other[name]["reasons"] == first["reasons"], name
        for when in ("weights", "later"):
            difference = (first[when] - expected[when]).norm() / expected[when].norm()
            # AdamW's steps do not get smaller with the gradient: a rounding that turns one of them round is as long as they are.
            rounded = expected[when].dtype == torch.float32 and when == "later"
            assert difference < (1e-3 if rounded else tolerance), (name, when)
        assert first["reasons"] == expected["reasons"], name


# --- In a Trainer --------------------------------------------------------------------------------------------------------


def in_trainer(rank, size):
    """Weights right after an event in each of two runs, and at their ends."""
    import tempfile

    found, shown = [], []
    for make, settings, training in (
        (
            mlp,
            {"epochs": 2, "num_batches": 2, "batch_size": 6},
            {"num_train_epochs": 2, "learning_rate": 0.1, "optim": "sgd", "disable_tqdm": False},
        ),
        (
            llama_rows,
            {"method": "basis", "steps": [3], "num_batches": 2, "batch_size": 4},
            {"max_steps": 6, "optim": "adamw_torch", "disable_tqdm": True},
        ),
    ):
        model, rows = make()
        after_event = []

        class Looking(TeleportTrainer):
            def teleport(self, seen=after_event):
                report = super().teleport()
                model = self.accelerator.unwrap_model(self.model)
                kept = [v.flatten() for p in model.parameters() for v in self.optimizer.state[p].values() if v is not None]
                seen.append(torch.cat([flat(model), *kept]))
                return report

        out, err = io.StringIO(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
            args = TeleportTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=8 // size,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                dataloader_pin_memory=False,
                max_grad_norm=0,
                ddp_backend="gloo" if size > 1 else None,
                ddp_find_unused_parameters=False,
                **training,
            )
            config = TeleportConfig(**{"method": "null_space", **settings})
            trainer = Looking(model, args, train_dataset=rows, teleport_config=config)
            trainer.train()
        assert all(report.steps > 0 for report in trainer.teleport_reports)
        found += [after_event[0], flat(model)]
        shown.append((out.getvalue(), err.getvalue()))
    return found, shown


def mlp():
    torch.manual_seed(0)
    rows = ImageTensors(torch.randn(48, 1, 8, 8), torch.arange(48) % 4)
    return MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(64, 64), num_labels=4)), rows


def llama_rows():
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, VOCAB, (32, 8))]
    return llama(torch.float32), rows


def test_a_trainer_on_two_ranks_teleports_as_on_one(tmp_path):
    (first, shown), (second, shown_by_second) = run(in_trainer, 2, tmp_path, joined=False)
    ((alone, _),) = run(in_trainer, 1, tmp_path, joined=False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    # After the first event. Training itself goes on otherwise: Accelerate shuffles otherwise for several processes.
    torch.testing.assert_close(first[0], alone[0], rtol=1e-4, atol=1e-6)
    # Bars, lines and the table are the first process's, and nobody's with disable_tqdm.
    (out, err), quiet = shown
    assert "Teleport (step 0):" in err
    assert "Teleport before step 6: loss" in out
    assert "Teleports: 2; " in out
    for out, err in (quiet, *shown_by_second):
        assert not any(words in out + err for words in ("Teleport (", "Teleport before", "Teleports: ", "%|"))


# --- When something goes wrong in one process only ---------------------------------------------------------------------------


class Fault:
    """A loss that misbehaves in process 1 from a call on."""

    def __init__(self, rank, kind, at):
        self.rank, self.kind, self.at, self.calls = rank, kind, at, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.rank == 1 and self.calls >= self.at:
            if self.kind == "error":
                raise RuntimeError("no such file")
            if self.kind == "memory" and len(batch["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.kind == "nan":
                return loss_fn(model, batch) * float("nan")
            if self.kind == "death":
                os._exit(3)
        return loss_fn(model, batch)


def faults(rank, size):
    found = {}
    for method in ("null_space", "basis"):
        for kind in ("error", "memory", "nan"):
            for at in (1, 5):
                model = llama(torch.float32)
                optimizer = trained(model, rank, size)
                before = flat(model)
                config = TeleportConfig(scope="batch", steps_per_batch=2).for_method(method)
                teleporter = Teleporter(model, config, optimizer=optimizer)
                try:
                    report = teleporter.teleport(tokens(rank, size), Fault(rank, kind, at))
                    outcome = report.stopped_because, report.rolled_back, report.steps
                except RuntimeError as error:
                    outcome = str(error)
                found[method, kind, at] = outcome, torch.equal(before, flat(model)), flat(model)
    return found


def means(rank, size):
    """Of tensors of two dtypes, of another layout, that one process has, and that nobody has."""
    like = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64), torch.zeros(3, 2), torch.zeros(()), torch.zeros(5)]
    own = [tensor + rank + i for i, tensor in enumerate(like)]
    own[0], own[2] = torch.arange(6.0).view(3, 2).T * (rank + 1), own[2] if rank else None
    return Ranks().mean_tensors([*own[:4], None], like), own


def one_sided(rank, size):
    return faults(rank, size), trusting(rank, size), means(rank, size)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """What two processes come to where something happens in one of them."""
    return run(one_sided, 2, tmp_path_factory.mktemp("one_sided"))


def test_a_fault_in_one_process_is_everybodys(sides):
    first, second = (found for found, *_ in sides)
    for (method, kind, at), (outcome, unchanged, weights) in first.items():
        assert torch.equal(weights, second[method, kind, at][2]), (method, kind, at)
        if kind == "error":
            # A change of basis looks five times at most.
            assert unchanged, (method, at)
            assert outcome == "another process failed in this teleport; its own message says where."
            assert second[method, kind, at][0] == "no such file"
        elif kind == "nan":
            assert unchanged or outcome[2] > 0, (method, at)
            assert unchanged or method == "null_space", "steps before the loss broke"
        else:
            assert outcome[2] > 0, "with batches of half the size it goes well"
            assert not unchanged


class Hidden:
    """A loss that, in the second process alone, has a part which autograd does not see and every move changes."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, model, batch):
        weight = model.lm_head.weight.detach().numpy()
        return loss_fn(model, batch) * (1 + self.rank * float((weight**2).sum()))


def trusting(rank, size):
    """What comes of an event that nobody can trust, with a little of its loss free to change and with hardly any."""
    found = []
    for limit in (1e-3, 1e-9):
        model = llama(torch.float64)
        before, began = flat(model), []
        teleporter = Teleporter(model, TeleportConfig(max_growth=None, max_loss_change=limit, steps_per_batch=2))
        method = teleporter._method

        def watched(loss, weights, method=method, began=began):
            made = method(loss, weights)
            begin = made.begin
            made.begin = lambda batch, seed: (began.append(made.trusting), begin(batch, seed))[1]
            return made

        teleporter._method = watched
        report = teleporter.teleport(tokens(rank, size, samples=2)[:1], Hidden(rank))
        found.append((began, report.steps, torch.equal(before, flat(model)), flat(model), report.loss_before, report.loss_after))
    return found


def test_a_loss_that_moves_in_one_process_is_no_longer_trusted_in_any(sides):
    first, second = (found for _, found, _ in sides)
    for mine, theirs, limit in zip(first, second, (1e-3, 1e-9), strict=True):
        began, steps, unchanged, weights, loss_before, loss_after = mine
        assert began == theirs[0] == [True, False]  # the event was made again
        assert (steps, unchanged) == theirs[1:3]
        assert torch.equal(weights, theirs[3])
        assert unchanged == (steps == 0)
        assert abs(loss_after - loss_before) <= limit * loss_before


def test_means_are_those_of_each_tensor(sides):
    (first, own), (second, others) = (found for *_, found in sides)
    assert first[-1] is second[-1] is None
    for i in range(4):
        mean = others[i] / 2 if own[i] is None else (own[i] + others[i]) / 2
        assert torch.equal(first[i], mean)
        assert torch.equal(second[i], mean)
        assert first[i].dtype == mean.dtype


def dying(rank, size):
    model = llama(torch.float32)
    try:
        Teleporter(model, TeleportConfig(scope="batch")).teleport(tokens(rank, size), Fault(rank, "death", 4))
    except RuntimeError as error:
        return type(error).__name__, torch.equal(flat(model), flat(llama(torch.float32)))
    return None


@pytest.mark.timeout(120)
def test_nobody_waits_for_a_process_that_died(tmp_path):
    with pytest.raises(Exception, match="exit"):
        run(dying, 2, tmp_path)
    # torch ends the other processes as soon as one has died; this one had noticed by itself, or had no time to.
    left = tmp_path / "dying-0-of-2.pt"
    assert not left.exists() or torch.load(left)[1]


# --- Alone -----------------------------------------------------------------------------------------------------------------


def test_jobs_are_spread_longest_first():
    ranks = Ranks()
    ranks.size = 3
    assert ranks.spread([1, 5, 4, 3, 3]) == [1, 0, 1, 2, 2]
    ranks.size = 1
    assert ranks.spread([1, 2]) == [0, 0]


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_sharded_weights_are_refused_with_a_way_out(kind):
    class Sharded:
        distributed_type = kind

    with pytest.raises(ValueError, match=rf"does not work with {kind}.*Use data parallelism"):
        check_strategy(Sharded())


@pytest.mark.parametrize("offloaded", [True, False])
def test_weights_on_the_cpu_are_refused_with_a_way_out(offloaded):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offloaded)
    sharded = SimpleNamespace(distributed_type="FSDP", is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=r"that FSDP2 keeps on the CPU.*to false") if offloaded else nullcontext():
        check_strategy(sharded)


def test_tensor_parallelism_is_refused_with_a_way_out():
    class Split:
        distributed_type = "NO"

        class parallelism_config:  # noqa: N801
            tp_enabled = True

    with pytest.raises(ValueError, match=r"does not work with tensor parallelism.*Use data parallelism"):
        check_strategy(Split())


def test_one_process_sends_nothing():
    assert not dist.is_initialized()
    model = nn.Linear(2, 2)
    assert Ranks().mean([1.0, 2.0]) == [1.0, 2.0]
    assert Ranks().gather("x") == ["x"]
    Ranks().broadcast(model.parameters())
