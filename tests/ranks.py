"""Run functions in several gloo processes on this machine, and collect what each returns; models and data for them."""

import os
import socket
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import forks
from tiny_models import VOCAB

# A process that waits for one that died gives up after this long.
TIME_LIMIT = timedelta(seconds=20)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank, size, port):
    return {
        "OMP_NUM_THREADS": "1",  # it decides how sums are rounded
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def _worker(rank, function, size, port, folder, joined, args, variables):
    forks.quick_collection()
    torch.set_num_threads(1)
    os.environ |= variables  # those of now: a forked process has those of when the first one was
    if size > 1:
        os.environ |= environment(rank, size, port)
        if joined:
            dist.init_process_group("gloo", timeout=TIME_LIMIT)
    torch.save(function(rank, size, *args), folder / f"{function.__name__}-{rank}-of-{size}.pt")


def run(function, size, folder, *args, joined=True):
    """`function(rank, size, *args)` of a module's top level, in so many processes. Returns what each returned, by rank.

    Args:
        joined: whether the processes are one group before it is called.
    """
    forks.start()
    given = function, size, free_port(), folder, joined, args, dict(os.environ)
    mp.start_processes(_worker, args=given, nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{function.__name__}-{rank}-of-{size}.pt") for rank in range(size)]


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}


def llama(dtype):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, use_cache=False)).to(dtype)


def mixtral(dtype):
    torch.manual_seed(0)
    config = MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=1, num_key_value_heads=1, use_cache=False)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    return MixtralForCausalLM(config).to(dtype)


def sharded(model, layers=None):
    """A model sharded by FSDP2 over all processes, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers if layers is None else layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def fsdp2_of_accelerate():
    """Inside, Accelerate sets FSDP2 up where it is asked to. It does so on GPUs only, and takes these CPUs for some."""
    with (
        mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)),
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_CPU="false"),
    ):
        yield


def tokens(rank, size, samples=4):
    """This process's share of three batches."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB, (samples, 6), generator=generator) for _ in range(3)]
    return [{"input_ids": ids, "labels": ids} for ids in (batch.chunk(size)[rank] for batch in batches)]


def flat(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]).clone()
