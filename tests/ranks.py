"""Run functions in several gloo processes on this machine, and collect what each returns."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def _worker(rank, function, size, port, folder, joined):
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if size > 1:
        os.environ |= environment(rank, size, port)
        if joined:
            dist.init_process_group("gloo", timeout=TIME_LIMIT)
    torch.save(function(rank, size), folder / f"{function.__name__}-{rank}-of-{size}.pt")


def run(function, size, folder, *, joined=True):
    """`function(rank, size)` of a module's top level, in so many processes. Returns what each returned, in the order of ranks.

    Args:
        joined: whether the processes are one group before it is called.
    """
    mp.start_processes(_worker, args=(function, size, free_port(), folder, joined), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"{function.__name__}-{rank}-of-{size}.pt") for rank in range(size)]
