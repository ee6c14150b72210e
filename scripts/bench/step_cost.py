"""Does a change of basis make the steps after it slower? Times training steps of one model with and without it, side by side.

python scripts/bench/step_cost.py --hidden_size 256 --layers 4
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def seconds_of_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """A training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15, help="steps of each, one after the other")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5000,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        use_cache=False,
    )
    plain = LlamaForCausalLM(config)
    turned = copy.deepcopy(plain)
    batches = [{"input_ids": (ids := torch.randint(0, 5000, (8, 128))), "labels": ids} for _ in range(8)]
    runs = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3)) for model in (plain, turned)]
    for model, optimizer in runs:
        seconds_of_step(model, optimizer, batches[0])
    start = time.perf_counter()
    report = Teleporter(turned, TeleportConfig(method="basis"), optimizer=runs[1][1]).teleport(batches, loss_fn)
    event = time.perf_counter() - start
    times = [[seconds_of_step(*run, batches[0]) for run in runs] for _ in range(args.repeats)]
    without, with_turn = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(report.summary())
    print(f"a step: {without:.3f} s without the turn, {with_turn:.3f} s after it, median ratio {ratio:.3f}")
    print(f"the event: {event / without:.1f} steps")


if __name__ == "__main__":
    main()
