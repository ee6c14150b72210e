"""Two gloo processes: the same weights everywhere, and the same as one process makes."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.data import ImageTensors
from hf_teleport.distributed import check_strategy
from hf_teleport.models import MLPConfig, MLPForImageClassification


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def turn(folder, ranks):
    """Weights and Adam's first moments right after a change of basis, and at the end of training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 29, (32, 8))]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 29}
    model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
    after_event = []

    class Looking(TeleportTrainer):
        def teleport(self):
            report = super().teleport()
            model = self.accelerator.unwrap_model(self.model)
            moments = [self.optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()]
            after_event.append(torch.cat([flat(model), *moments]))
            return report

    args = arguments(folder, ranks, max_steps=6, optim="adamw_torch", learning_rate=1e-2)
    config = TeleportConfig(method="basis", steps=[3], num_batches=2, batch_size=4)
    trainer = Looking(model, args, train_dataset=rows, teleport_config=config)
    trainer.train()
    assert [report.steps for report in trainer.teleport_reports] == [1]
    return after_event[0], flat(model)


def train(folder, ranks):
    """Weights right after the first teleport, and at the end of training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = ImageTensors(torch.randn(48, 1, 8, 8), torch.arange(48) % 4)
    torch.manual_seed(0)
    model = MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(64, 64), num_labels=4))
    after_event = []

    class Looking(TeleportTrainer):
        def teleport(self):
            report = super().teleport()
            after_event.append(flat(self.accelerator.unwrap_model(self.model)))
            return report

    args = arguments(folder, ranks, num_train_epochs=2, learning_rate=0.1, optim="sgd")
    config = TeleportConfig(epochs=2, num_batches=2, batch_size=6)
    trainer = Looking(model, args, train_dataset=data, teleport_config=config)
    trainer.train()
    assert [report.steps > 0 for report in trainer.teleport_reports] == [True, True]
    return after_event[0], flat(model)


def arguments(folder, ranks, **settings):
    return TeleportTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // ranks,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0,
        ddp_backend="gloo" if ranks > 1 else None,
        ddp_find_unused_parameters=False,
        **settings,
    )


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def worker(rank, run, ranks, port, folder):
    # Accelerate sets the number of threads for several CPU processes, and it decides how sums are rounded.
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    torch.save(run(folder, ranks), folder / f"rank{rank}of{ranks}.pt")


def weights_of(run, ranks, folder):
    mp.start_processes(worker, args=(run, ranks, free_port(), folder), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"rank{rank}of{ranks}.pt") for rank in range(ranks)]


@pytest.mark.timeout(240)
def test_two_ranks_equal_one(tmp_path):
    first, second = weights_of(train, 2, tmp_path)
    (alone,) = weights_of(train, 1, tmp_path)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    # After the first event. Training itself goes on otherwise: Accelerate shuffles otherwise for several processes.
    assert torch.equal(first[0], alone[0])


@pytest.mark.timeout(240)
def test_two_ranks_turn_alike_weights_and_moments(tmp_path):
    first, second = weights_of(turn, 2, tmp_path)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_sharded_weights_are_refused_with_a_way_out():
    class Sharded:
        distributed_type = "DEEPSPEED"

    with pytest.raises(ValueError, match=r"does not work with DEEPSPEED yet.*Use data parallelism"):
        check_strategy(Sharded())
