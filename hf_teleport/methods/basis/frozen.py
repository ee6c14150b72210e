"""Frozen weights that are turned in memory: a copy of what was loaded, and heads that are untied meanwhile.

A frozen weight in turned coordinates is always made from its copy by the composed way, and never from the weight of the last
event. So a resumed run has it bit for bit, and at home it is bit for bit what was loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_teleport.layers.roles import end_layer
from hf_teleport.methods.basis.symmetry import Symmetry
from hf_teleport.report import LayerReport


def stays_frozen(parameter: nn.Parameter) -> str:
    """Why a frozen weight can't be turned in memory; empty: it can.

    Args:
        parameter: as it is stored.
    """
    if isinstance(parameter, DTensor):
        return "frozen: requires_grad is False, and FSDP2 shards it; only weights that a process holds whole turn in memory"
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return "frozen and quantized: turned, it would have to be quantized anew, and would not be what was loaded"
    return ""


def frozen_objection(symmetry: Symmetry, reports: Mapping[nn.Parameter, LayerReport]) -> str:
    """Why frozen weights keep a symmetry from turning; empty: they do not.

    Either all of its weights are frozen, or a frozen one would have to take in a gain that is trained.
    """
    if not any(parameter.requires_grad for parameter in symmetry.parameters):
        return "all of its weights are frozen"
    for fold in symmetry.folds:
        frozen = [reader for reader, _, _ in fold.readers if not reader.requires_grad]
        if frozen and fold.norm.gain.requires_grad:
            norm, reader = (reports[parameter].name for parameter in (fold.norm.gain, frozen[0]))
            return f"{norm} is trained, and would have to be folded into {reader}, which is frozen: freeze both, or train both"
    return ""


class Frozen:
    """The frozen weights of a model that were turned in memory.

    Attributes:
        originals: for each of them what was loaded, on the CPU.
    """

    def __init__(self) -> None:
        self.originals: dict[nn.Parameter, Tensor] = {}
        self._tied: list[tuple[nn.Module, nn.Parameter]] = []

    def release(self) -> None:
        """Forget the copies of what is trained by now: it was unfrozen in mid-run, and turns back as training has left it."""
        self.originals = {p: values for p, values in self.originals.items() if not p.requires_grad}

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy frozen weights before they are turned for the first time."""
        for parameter in parameters:
            if not parameter.requires_grad and parameter not in self.originals:
                self.originals[parameter] = parameter.detach().to("cpu", copy=True)

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Put back what was loaded, bit for bit; default: all of it, and heads are tied again."""
        for parameter in list(self.originals if parameters is None else parameters):
            parameter.copy_(self.originals.pop(parameter))
        if parameters is None:
            while self._tied:
                head, embedding = self._tied.pop()
                head.weight = embedding

    def untie(self, model: nn.Module) -> None:
        """Give a frozen head that is tied to the embedding a copy of its own in memory, so that it can be turned by itself.

        Adapters' models alone: what others save holds the head, and is loaded as one weight.
        """
        inner = getattr(model, "get_base_model", None)
        if inner is None or not hasattr(model, "peft_config"):
            return
        base = inner()
        ends: list[Any] = [end_layer(base, "input"), end_layer(base, "output")]
        weights: list[Any] = [getattr(end, "weight", None) for end in ends]
        embedding, head = weights
        if isinstance(embedding, nn.Parameter) and head is embedding and not (embedding.requires_grad or stays_frozen(embedding)):
            holder = getattr(ends[1], "base_layer", ends[1])  # where the head has an adapter of its own
            self._tied.append((holder, embedding))
            holder.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
