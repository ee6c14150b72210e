"""The optimizers that people train with, package by package, and how to make each for a model."""

import inspect
from collections.abc import Callable, Iterator
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

PACKAGES = [
    "Trainer", "torch", "pytorch_optimizer", "torchao", "bitsandbytes", "galore-torch", "apollo-torch", "schedulefree",
]  # fmt: skip
RATE = 1e-3

Make = Callable[[nn.Module], Any]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside, AdamW for the rest, as those who train with `Trainer` write it."""

    def __init__(self, model: nn.Module):
        super().__init__(list(model.parameters()), {"lr": RATE})
        inside = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "head" not in n]
        rest = [p for p in model.parameters() if not any(p is q for q in inside)]
        self.optimizers = [torch.optim.Muon(inside, lr=RATE), torch.optim.AdamW(rest, lr=RATE)]
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def optimizers_of(module: Any) -> Iterator[tuple[str, type]]:
    """The optimizers that a package offers, by their names."""
    for name, kind in sorted(vars(module).items()):
        base = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        if base and not name.startswith("_") and not name.startswith("Optimizer"):
            yield name, kind


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices, and the vectors."""
    return [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]


def by_kind(kind: type, **options: Any) -> Make:
    """An optimizer of a model's parameters; of the model, or of matrices and the rest, if it asks for that."""

    def make(model: nn.Module) -> Any:
        errors = []
        matrices, vectors = split(model)
        for parameters in (
            list(model.parameters()),
            [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}],
            model,
            matrices,
        ):
            for rate in ({"lr": RATE}, {"lr": RATE, "momentum": 0.9}, {}):
                try:
                    return kind(parameters, **rate, **options)
                except Exception as error:  # each asks for something else
                    errors.append(error)
        raise errors[0]

    return make


def low_rank(kind: type, **options: Any) -> Make:
    """Projected averages for the matrices, plain ones for the vectors."""

    def make(model: nn.Module) -> Any:
        matrices, vectors = split(model)
        own = {"relative_step": False} if "relative_step" in inspect.signature(kind).parameters else {}
        return kind([{"params": vectors}, {"params": matrices, "rank": 8, "update_proj_gap": 200, **options}], lr=RATE, **own)

    return make


def by_name(name: str) -> Make:
    """As Transformers makes it for `TrainingArguments(optim=name)`."""

    def make(model: nn.Module) -> Any:
        options = {"optim_target_modules": ["self_attn", "mlp"]} if "galore" in name or "apollo" in name else {}
        rank = "rank=8" if "apollo" in name or "galore" in name else None
        args = TrainingArguments(gettempdir(), optim=name, learning_rate=RATE, optim_args=rank, use_cpu=True, **options)
        given = {"lr": RATE}
        adam = {"betas": (0.9, 0.999), "eps": 1e-8}
        context = OptimizerContext(args, model, given, adam, {"rank": "8"} if rank else {})
        kind, taken = _OPTIMIZER_HANDLERS[args.optim](context)
        own = taken.pop("params", list(model.parameters()))
        return kind(taken.pop("optimizer_dict", own), **taken)

    return make


def catalogue() -> Iterator[tuple[str, str, Make]]:
    """Package, optimizer, and how to make it for a model."""
    for name, kind in optimizers_of(torch.optim):
        yield "torch", name, by_kind(kind)
    yield "torch", "Muon + AdamW", MuonAndAdamW
    import pytorch_optimizer

    for name in pytorch_optimizer.get_supported_optimizers():
        kind = pytorch_optimizer.load_optimizer(name)
        if kind.__module__.startswith("pytorch_optimizer"):
            yield "pytorch_optimizer", kind.__name__, by_kind(kind)
    import bitsandbytes
    import torchao.optim

    for package, module in (("torchao", torchao.optim), ("bitsandbytes", bitsandbytes.optim)):
        for name, kind in optimizers_of(module):
            yield package, name, by_kind(kind)
    import galore_torch

    for name, kind in optimizers_of(galore_torch):
        yield "galore-torch", name, low_rank(kind, scale=0.25, proj_type="std")
    import apollo_torch

    for projection in ("random", "svd"):
        own = {"scale": 1.0, "proj_type": "std", "proj": projection, "scale_type": "channel"}
        yield "apollo-torch", f"APOLLOAdamW, {projection}", low_rank(apollo_torch.APOLLOAdamW, **own)
    import schedulefree

    for name, kind in optimizers_of(schedulefree):
        yield "schedulefree", name, by_kind(kind)


def made() -> dict[tuple[str, str], Make]:
    """The catalogue, each optimizer once."""
    return {(package, name): make for package, name, make in catalogue()}
