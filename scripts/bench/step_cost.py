"""What a change of basis costs in training steps: an event, a reading of gradients, and whether steps after a turn are slower.

python scripts/bench/step_cost.py --hidden_size 128 256 384 512 --layers 4

CPU seconds of one thread, so that other work on the machine matters little. A step is 8 x 128 tokens of a Llama with AdamW.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def seconds_of(work: Callable[[], Any]) -> float:
    """CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """A training step."""
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()


def measure(hidden_size: int, layers: int, repeats: int) -> str:
    """A line with the median times for one width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5000,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
    )
    plain = LlamaForCausalLM(config)
    turned = copy.deepcopy(plain)
    batch = {"input_ids": (ids := torch.randint(0, 5000, (8, 128))), "labels": ids}
    runs = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3)) for model in (plain, turned)]
    for run in runs:
        step(*run, batch)
    teleporter = Teleporter(turned, TeleportConfig(method="basis"), optimizer=runs[1][1])
    teleporter.check(batch, loss_fn)
    events, readings, times = [], [], []
    for at in range(repeats):
        times.append([seconds_of(lambda run=run: step(*run, batch)) for run in runs])
        readings.append(seconds_of(lambda at=at: teleporter.tracker.look(at * teleporter.config.track_every)))
        if at % 4 == 3:
            events.append(seconds_of(lambda: teleporter.teleport([batch], loss_fn)))
    plain_step = statistics.median(before for before, _ in times)
    ratio = statistics.median(after / before for before, after in times)
    event, reading = statistics.median(events), statistics.median(readings)
    return (
        f"width {hidden_size}: a step {plain_step:.3f} s, x {ratio:.2f} after a turn; an event {event:.2f} s = "
        f"{event / plain_step:.1f} steps; a reading {reading:.3f} s, every {teleporter.config.track_every} steps "
        f"{reading / plain_step / teleporter.config.track_every:.1%} of training"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, nargs="+", default=[128])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=12, help="training steps; an event follows every fourth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for width in args.hidden_size:
        print(measure(width, args.layers, args.repeats), flush=True)


if __name__ == "__main__":
    main()
