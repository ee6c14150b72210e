"""Tiny architectures of Transformers, with random weights, each with a batch of inputs that gives a scalar loss.

    from architectures import NAMES, build, loss_fn

    model, batch = build("llama", torch.float64)
    loss_fn(model, batch).backward()

An architecture is one line of the tables in this folder: a class of Transformers, the sizes of its config that differ from
those of its kind (`kinds.py`), and where needed its own batch (`batches.py`). Whatever a line leaves out, the attention
implementation and dropout included, is the library's default.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import multimodal, signals, text, vision
from .batches import Batch

FAMILIES = text.FAMILIES | vision.FAMILIES | signals.FAMILIES | multimodal.FAMILIES
NAMES = [name for members in FAMILIES.values() for name in members]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A model, as it comes out of its constructor, and its batch; both are functions of the seed, which this sets."""
    architectures = {name: architecture for members in FAMILIES.values() for name, architecture in members.items()}
    if name not in architectures:
        raise KeyError(f"no architecture is called {name!r}, but these are: {', '.join(NAMES)}")
    head, batch, sizes = architectures[name]
    model_class = getattr(transformers, head)
    transformers.set_seed(seed)
    model = model_class(model_class.config_class(**deepcopy(sizes))).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one, torch's grouped_mm, knows no float64
    return model, cast(batch(), dtype)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, or else how far its outputs are from a fixed pattern."""
    outputs = model(**batch)
    if outputs.get("loss") is not None:
        return outputs["loss"].mean()
    # not from zero: what a normalization gives has the same mean square whatever the weights are
    return torch.stack([(x - torch.arange(x.numel()).to(x).cos().view_as(x)).square().mean() for x in floats(outputs)]).sum()


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The same nest of dicts and lists, with its floating tensors in a dtype."""
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, list):
        return [cast(value, dtype) for value in batch]
    return batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def floats(outputs: Any) -> Iterator[Tensor]:
    """The floating tensors in a nest of mappings, tuples and lists."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from floats(value)
