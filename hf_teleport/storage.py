"""The weights as a teleport works on them: whole where FSDP2 shards them, in float32 where they are stored in less."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from hf_teleport.optimizer_state import unwrapped

_LOW = (torch.bfloat16, torch.float16)


def is_low(model: nn.Module) -> bool:
    """Whether some weight is stored in bf16 or fp16."""
    return any(parameter.dtype in _LOW for parameter in model.parameters())


@contextmanager
def gathered(model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Weights that FSDP2 shards are whole inside, in every process, and so is what the optimizer keeps for them.

    Afterwards each process keeps its shards of what they have become. FSDP2's own hooks, which would gather and shard the weights
    again at every layer and in the precision of training, are off meanwhile.
    """
    state = {} if optimizer is None else unwrapped(optimizer).state
    wholes: dict[Any, nn.Parameter] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward it may not be
                _silence(module, "_forward_pre_hooks", stack)
                _silence(module, "_forward_hooks", stack)
            for name, shard in list(module._parameters.items()):
                if isinstance(shard, DTensor):
                    if shard not in wholes:
                        wholes[shard] = nn.Parameter(shard.detach().full_tensor().clone(), shard.requires_grad)
                    module._parameters[name] = wholes[shard]
                    stack.callback(module._parameters.__setitem__, name, shard)
        for shard, whole in wholes.items():
            if shard in state:
                state[whole] = {k: v.full_tensor().clone() if isinstance(v, DTensor) else v for k, v in state[shard].items()}
                stack.callback(state.pop, whole, None)
        yield
        with torch.no_grad():
            for shard, whole in wholes.items():
                _put_back(shard, whole)
                for name, value in state.get(whole, {}).items():
                    if isinstance(value, Tensor) and isinstance(state[shard][name], DTensor):
                        _put_back(state[shard][name], value)


def _silence(module: nn.Module, hooks: str, stack: ExitStack) -> None:
    """Take FSDP2's hooks off until the stack closes."""
    own: OrderedDict[int, Any] = getattr(module, hooks)
    kept = {key: hook for key, hook in own.items() if not hook.__module__.startswith("torch.distributed.fsdp")}
    if len(kept) < len(own):
        stack.callback(setattr, module, hooks, own)
        setattr(module, hooks, OrderedDict(kept))


def _put_back(shard: DTensor, whole: Tensor) -> None:
    """Write this process's part of a whole tensor into its shard."""
    mesh = shard.device_mesh
    everywhere = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.to_local().copy_(everywhere.redistribute(placements=shard.placements).to_local())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Weights and buffers that are stored in bf16 or fp16 are float32 inside, and are rounded back after.

    One that did not change is bit for bit what it was. Costs 4 bytes for each weight of them, as long as it lasts.

    Yields:
        A function that rounds the weights to what will be stored, to see what will come of them; it says whether there are any.
    """
    stored: list[tuple[Tensor, Tensor]] = []
    # Tensors that share storage go on sharing it.
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in _LOW:
            data = tensor.data
            key = (data.data_ptr(), data.shape, data.stride())
            stored.append((tensor, data))
            tensor.data = copies.setdefault(key, data.float())

    def round_() -> bool:
        for tensor, data in stored:
            tensor.data.copy_(tensor.data.to(data.dtype))
        return bool(stored)

    try:
        yield round_
    finally:
        for tensor, data in stored:
            data.copy_(tensor.data)
            tensor.data = data
