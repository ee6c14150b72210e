"""Memory that an event takes under FSDP2, with weights that stay sharded and with weights gathered whole: peak RSS of a process.

    python scripts/bench/fsdp_memory.py --processes 2 --method basis

A change of basis turns the state of an AdamW along.
Prints for each way the peak beyond what a process held before the event, in MB and in sizes of the whole model. Linux only.
"""

import argparse
import os
import re
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods import METHODS

_STATUS = Path("/proc/self/status")


def resident(name: str) -> float:
    """VmRSS, what is resident, or VmHWM, the most that was, in MB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())[1]) / 1000


def peak_of_event(method: str, gathered: bool, layers: int) -> tuple[float, float]:
    """Peak beyond what was held before, and the size of the whole model, in MB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000, use_cache=False))
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    batches = [{"input_ids": ids, "labels": ids}]

    def loss_fn(model, batch):
        return model(**batch).loss

    optimizer = torch.optim.AdamW(model.parameters())
    if method == "basis":
        loss_fn(model, batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if gathered:
        METHODS[method].on_shards = staticmethod(lambda config: False)
    teleporter = Teleporter(model, TeleportConfig(steps_per_batch=1).for_method(method), optimizer=optimizer)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    report = teleporter.teleport(batches, loss_fn)
    assert report.steps == 1, report.summary()
    return resident("VmHWM") - before, size


def process(rank: int, size: int, port: int, method: str, gathered: bool, layers: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    peak, whole = peak_of_event(method, gathered, layers)
    peaks = [None] * size
    dist.all_gather_object(peaks, peak)
    if rank == 0:
        way = "gathered whole" if gathered else "sharded"
        most = max(peaks)
        print(f"{method}, {way:15} {whole:.0f} MB of weights, {size} processes: {most:.0f} MB, {most / whole:.2f} models")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", choices=["null_space", "basis"], default="null_space")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    for gathered in (True, False):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        given = args.processes, port, args.method, gathered, args.layers
        mp.start_processes(process, args=given, nprocs=args.processes, start_method="spawn")


if __name__ == "__main__":
    main()
