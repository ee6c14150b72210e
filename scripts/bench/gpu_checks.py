"""The checks of `gpu.py`: that runs on a device train and teleport as they should.

Those of several processes run in a process of their own, the only rank of its group.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.report import TeleportReport

Check = Callable[[], str]

# What torchrun would tell the only process of a group. A port of 0 is any that is free.
_ONLY_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

_VOCABULARY, _LENGTH, _STEPS = 512, 32, 16
_METHODS = {
    "basis": {"teleport_method": "basis", "teleport_steps": "4,8", "teleport_track_every": 1},
    "null_space": {"teleport_method": "null_space", "teleport_steps": "4,8", "teleport_num_batches": 1, "teleport_batch_size": 1},
}


def checks(device: torch.device) -> dict[str, Check]:
    """The checks by their names, but for those of several processes."""
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"bf16": True}}
    if device.type == "cuda":
        kinds["fp16"] = {"fp16": True}  # on a CPU Trainer has no GradScaler
    # Inductor would need a C++ compiler on a CPU.
    kinds["compile"] = {"torch_compile": True, "torch_compile_backend": "inductor" if device.type == "cuda" else "aot_eager"}
    return {f"{kind}, {method}": partial(_train, device, method, kinds[kind]) for kind in kinds for method in _METHODS}


def passed(name: str, check: Check) -> dict[str, Any]:
    """What came of a check: an error is one that has failed, and the rest go on."""
    start = time.perf_counter()
    try:
        found, said = True, check()
    except Exception as error:
        found, said = False, f"{type(error).__name__}: {error}".partition("\n")[0]
    return {"check": name, "passed": found, "said": said, "seconds": round(time.perf_counter() - start, 1)}


def of_ranks(device: torch.device) -> list[dict[str, Any]]:
    """The checks of several processes, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, __file__, "--device", device.type, "--json", str(file)]
        done = subprocess.run(words, env={**os.environ, **_ONLY_RANK}, capture_output=True, text=True)
        if file.exists():
            return json.loads(file.read_text())
    said = done.stderr.strip().splitlines() or [f"it ended with the status {done.returncode}"]
    return [{"check": "ranks", "passed": False, "said": said[-1], "seconds": 0.0}]


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=_VOCABULARY, use_cache=False))


def _rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, _VOCABULARY, (16, _LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def _train(device: torch.device, method: str, kind: dict[str, Any]) -> str:
    """Trainer's run over few rows, which it learns, with two events."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TeleportTrainingArguments(
            output_dir=folder,
            max_steps=_STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            **_METHODS[method],
            **kind,
        )
        trainer = TeleportTrainer(_llama(), arguments, train_dataset=_rows())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    _require(trainer.model.device.type == device.type, f"the model is on {trainer.model.device}")
    _require(not kind.get("fp16") or trainer.accelerator.scaler is not None, "there is no GradScaler")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    _require(losses[-1] < losses[0] - 1, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return _judged(trainer.teleport_reports, 2)


def _judged(reports: list[TeleportReport], count: int) -> str:
    _require(len(reports) == count, f"there were {len(reports)} events, not {count}")
    for report in reports:
        _require(report.steps > 0 and not report.rolled_back, report.summary())
    changes = [abs(report.loss_after / report.loss_before - 1) for report in reports]
    return f"{count} events, loss changed by {max(changes):.1e} at most"


def _require(found: bool, said: str) -> None:
    if not found:
        raise AssertionError(said)


def _sharded(device: torch.device, method: str) -> str:
    """Events of weights that FSDP2 has sharded, and a step after each."""
    model = _llama().to(device)
    mesh = init_device_mesh(device.type, (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [{name: torch.stack([row[name] for row in _rows()[:1]]).to(device) for name in ("input_ids", "labels")}]
    reports = []
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teleporter = Teleporter(model, TeleportConfig(method=method), optimizer=optimizer)
        reports.append(teleporter.teleport(batches, lambda model, batch: model(**batch).loss))
    _require(all(isinstance(parameter, DTensor) for parameter in model.parameters()), "a weight is no longer sharded")
    return _judged(reports, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    found = []
    for method in _METHODS:
        found.append(passed(f"{backend}, {method}", partial(_train, args.device, method, {"ddp_backend": backend})))
        found.append(passed(f"FSDP2, {method}", partial(_sharded, args.device, method)))
    args.json.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
