"""How the time of an event's decompositions falls with the number of processes: measured here, and computed for a 7B Llama.

    python scripts/bench/benchmark_ranks.py --json runs/ranks.json

Measured: the null spaces at tau = 0.99 of as many layers as a small Llama has, from Gram matrices, by 1, 2 and 4 gloo processes
of one thread each. The time is CPU time of the process that needs the most, so that processes may be more than cores.

Computed: the same spreading of the real layers of Llama-2-7B, with d³ to a decomposition, for up to 64 processes: how many times
shorter it takes than on one, and no shorter than its largest layer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from hf_teleport.layers.subspace import Representation
from hf_teleport.methods.null_space.decomposition import null_spaces
from hf_teleport.weights.ranks import Ranks

# Inputs of one block: of q, k and v, of o, of gate and up (each read together), and of down, wider by 8/3.
BLOCK = [1, 1, 1, 8 / 3]
LLAMA_7B = {"width": 4096, "inner": 11008, "blocks": 32}


def widths(width: int, blocks: int) -> list[int]:
    return [int(width * factor) for factor in BLOCK] * blocks


def worker(rank: int, size: int, widths: list[int], repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    ranks = Ranks()
    generator = torch.Generator().manual_seed(rank)
    seconds = []
    for _ in range(repeats):
        representations: dict[int, Representation] = {}
        for layer, width in enumerate(widths):
            representations[layer] = Representation()
            representations[layer].add(torch.randn(1, 2 * width // size, width, generator=generator))
            representations[layer].square()
        start = time.process_time()
        null_spaces(representations, dict.fromkeys(representations, torch.float32), 0.99, ranks)
        seconds.append(max(ranks.gather(time.process_time() - start)))
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(min(seconds)))
    if size > 1:
        dist.destroy_process_group()


def measured(size: int, args: argparse.Namespace) -> float:
    """CPU seconds of the process that needs the most."""
    with tempfile.TemporaryDirectory() as folder:
        work = (size, widths(args.width, args.blocks), args.repeats, folder)
        mp.start_processes(worker, args=work, nprocs=size, start_method="spawn")
        return json.loads(Path(folder, "seconds.json").read_text())


def speedup(size: int) -> float:
    """Of the decompositions of Llama-2-7B, spread over so many processes."""
    width, inner, blocks = LLAMA_7B.values()
    costs = [float(d) ** 3 for d in [width, width, width, inner] * blocks]
    ranks = Ranks(several=False)
    ranks.size = size
    loads = [0.0] * size
    for cost, owner in zip(costs, ranks.spread(costs), strict=True):
        loads[owner] += cost
    return sum(costs) / max(loads)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="the shortest time counts; default: %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(words)
    seconds = {size: measured(size, args) for size in args.processes}
    table = Table("processes", "CPU seconds", "times shorter", title=f"{4 * args.blocks} decompositions, width {args.width}")
    first = seconds[args.processes[0]] * args.processes[0]
    for size, each in seconds.items():
        table.add_row(str(size), f"{each:.2f}", f"{first / each:.2f}")
    sizes = [1, 2, 4, 8, 16, 32, 64]
    computed = Table("processes", "times shorter", title="Llama-2-7B, computed")
    for size in sizes:
        computed.add_row(str(size), f"{speedup(size):.1f}")
    console = Console(width=80)
    console.print(table, computed)
    found = {"seconds": seconds, "llama_7b": {size: speedup(size) for size in sizes}}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
