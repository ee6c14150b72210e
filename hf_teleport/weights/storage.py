"""The weights as a teleport works on them: in float32 where they are stored in less; those of FSDP2 as shards, or gathered."""

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
    """Whether some weight is stored in bf16 or fp16."""
    return any(parameter.dtype in LOW for parameter in model.parameters())


@contextmanager
def working_weights(
    model: nn.Module, state: MutableMapping[Any, Any] | None = None, ranks: Ranks = ALONE, on_shards: bool = False
) -> Iterator[Weights]:
    """Inside, weights that FSDP2 shards can be worked on, and weights and buffers in bf16 or fp16 are float32.

    The model's modules hold stand-ins meanwhile, and the optimizer's state has them as keys. The stored parameters themselves, on
    which DDP has hooks, keep all but their values. The values are written back at the end: each process writes its rounded
    shards. Values that did not change are bit for bit what they were. FSDP2's own hooks are off, because they would gather and
    shard the weights again at every layer and in the precision of training. The stand-ins cost memory: 4 bytes for each
    weight in half precision, and all of the weights with the optimizer's state if those are gathered.

    Args:
        ranks: the processes that work on the weights.
        on_shards: a sharded weight's stand-in is this process's part of it, and is whole only while its module runs, if the
            weights' layout allows that (`can_stay_sharded`). Otherwise it is the whole weight, in every process.
    """
    on_shards = on_shards and can_stay_sharded(model, ranks.size)
    state = {} if state is None else state
    made: dict[Any, nn.Parameter] = {}  # for each stored parameter its stand-in
    copies: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward it may not be
                _silence(module, "_forward_pre_hooks", stack)
                _silence(module, "_forward_hooks", stack)
        for module in model.modules():
            for name, stored in list(module._parameters.items()):
                # Subclasses of Parameter (quantized weights) know how to compute with what they store.
                if isinstance(stored, DTensor) or (type(stored) is nn.Parameter and stored.dtype in LOW):
                    if stored not in made:
                        made[stored] = (
                            Shard.of(stored) if on_shards else nn.Parameter(_copy(stored, copies), stored.requires_grad)
                        )
                    # As an attribute, for modules that look at it (nn.LSTM keeps a list of its weights).
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
    """A stored parameter's values, whole and in float32 at least. Parameters that share storage have copies that do."""
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
    """Give a stored parameter, and the optimizer's state for it, the values of its stand-in."""
    if not stored.requires_grad and (
        isinstance(stored, DTensor) or torch.allclose(stand_in, stored.to(stand_in.dtype), rtol=0, atol=0, equal_nan=True)
    ):
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
    """Take FSDP2's hooks off until the stack closes."""
    own: OrderedDict[int, Any] = getattr(module, hooks)
    kept = {key: hook for key, hook in own.items() if not hook.__module__.startswith("torch.distributed.fsdp")}
    if len(kept) < len(own):
        stack.callback(setattr, module, hooks, own)
        setattr(module, hooks, OrderedDict(kept))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all elements are equal; NaN equals NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
