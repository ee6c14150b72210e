"""Prepare stored weights for an event: half precision becomes float32, and FSDP2's weights become shards or are gathered."""

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_teleport.weights.ranks import ALONE, Ranks
from hf_teleport.weights.shards import Shard, Shards, can_stay_sharded, put
from hf_teleport.weights.whole import LOW, Weights


def is_low(model: nn.Module) -> bool:
    """Whether a weight is stored in bf16 or fp16."""
    return any(parameter.dtype in LOW for parameter in model.parameters())


@contextmanager
def working_weights(
    model: nn.Module, state: MutableMapping[Any, Any] | None = None, ranks: Ranks = ALONE, on_shards: bool = False
) -> Iterator[Weights]:
    """Inside, FSDP2's weights can be read and changed, and weights and buffers in bf16 or fp16 are float32.

    The model's modules have stand-ins for the stored parameters, and the optimizer's state has the stand-ins as keys. The stored
    parameters, on which DDP has hooks, remain as objects. At the end the rounded values are written back, and each process writes
    its shards. Values that did not change are bit for bit what they were.

    FSDP2's own hooks are off. They would gather and shard the weights again at every layer, in the precision of training. The
    stand-ins cost memory: 4 bytes for each weight in half precision, and if weights are gathered, all of them with their
    optimizer state.

    Args:
        state: the optimizer's state of each parameter.
        ranks: the processes that work on the weights.
        on_shards: whether the stand-in of a sharded weight is this process's part, and is whole only while its module runs. The
            weights' layout must allow it (`can_stay_sharded`). Otherwise the stand-in is the whole weight on every process.
    """
    on_shards = on_shards and can_stay_sharded(model, ranks.size)
    state = {} if state is None else state
    made: dict[Any, nn.Parameter] = {}  # for each stored parameter its stand-in
    copies: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward the weights may still be gathered
                _silence(module, "_forward_pre_hooks", stack)
                _silence(module, "_forward_hooks", stack)
        for module in model.modules():
            for name, stored in list(module._parameters.items()):
                # Subclasses of Parameter, such as quantized weights, compute with their stored values themselves.
                if isinstance(stored, DTensor) or (type(stored) is nn.Parameter and stored.dtype in LOW):
                    if stored not in made:
                        made[stored] = (
                            Shard.of(stored) if on_shards else nn.Parameter(_copy(stored, copies), stored.requires_grad)
                        )
                    # By setattr, because some modules react to it (nn.LSTM keeps a list of its weights).
                    setattr(module, name, made[stored])
                    stack.callback(setattr, module, name, stored)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.dtype in LOW:
                    module._buffers[name] = buffer.float()
                    stack.callback(module._buffers.__setitem__, name, buffer)
        for stored, stand_in in made.items():
            if stored in state:
                state[stand_in] = {name: _own(value) if on_shards else _whole(value) for name, value in state[stored].items()}
                stack.callback(state.pop, stand_in, None)
        originals = {stand_in: stored for stored, stand_in in made.items()}
        weights = Shards(ranks, originals, model) if on_shards else Weights(ranks, originals)
        stack.callback(weights.release)
        try:
            yield weights
        finally:
            for stored, stand_in in made.items():
                _write_back(stand_in, stored, state)


def _copy(stored: Any, copies: dict[Any, Tensor]) -> Any:
    """A stored parameter's whole values, at least in float32. If parameters share storage, so do their copies."""
    if isinstance(stored, DTensor):
        whole: Any = stored.detach().full_tensor().clone()  # type: ignore[attr-defined]
        return whole.float() if whole.dtype in LOW else whole
    storage = stored.untyped_storage()
    if storage.data_ptr() not in copies:
        size = storage.nbytes() // stored.element_size()
        copies[storage.data_ptr()] = stored.detach().as_strided((size,), (1,), 0).float()
    return copies[storage.data_ptr()].as_strided(stored.shape, stored.stride(), stored.storage_offset())


def _own(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Any) -> Any:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


@torch.no_grad()
def _write_back(stand_in: nn.Parameter, stored: Any, state: MutableMapping[Any, Any]) -> None:
    """Copy a stand-in's values, and its optimizer state, to the stored parameter."""
    if not stored.requires_grad and (isinstance(stored, DTensor) or _equal(stand_in, stored.to(stand_in.dtype))):
        return
    put_back = _put_own if isinstance(stand_in, Shard) else put
    put_back(stored, stand_in)
    if stored not in state:
        return
    if stand_in not in state:
        del state[stored]
        return
    for name, value in state[stand_in].items():
        if isinstance(state[stored][name], DTensor):
            put_back(state[stored][name], value)
        else:
            state[stored][name] = value


def _put_own(stored: Any, part: Tensor) -> None:
    """Copy this process's part into a sharded tensor."""
    stored.to_local().copy_(part)


def _silence(module: nn.Module, hooks: str, stack: ExitStack) -> None:
    """Remove FSDP2's hooks until the stack closes."""
    own: OrderedDict[int, Any] = getattr(module, hooks)
    kept = {key: hook for key, hook in own.items() if not hook.__module__.startswith("torch.distributed.fsdp")}
    if len(kept) < len(own):
        stack.callback(setattr, module, hooks, own)
        setattr(module, hooks, OrderedDict(kept))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all elements are equal. NaN equals NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
