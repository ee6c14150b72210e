"""Several processes: the same weights on every rank after a teleport."""

from typing import Any

import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn

_REPLICATED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


def check_strategy(accelerator: Any) -> None:
    """Make sure that each process holds the whole model.

    Raises:
        ValueError: the weights are sharded.
    """
    kind = accelerator.distributed_type
    if kind not in _REPLICATED:
        raise ValueError(
            f"teleportation does not work with {kind} yet, because its weights are split over processes. "
            "Use data parallelism (DDP: `accelerate launch --multi_gpu`), or set teleport_epochs to 0."
        )


def broadcast_weights(model: nn.Module, optimizer: Any = None) -> None:
    """Give every rank the trainable weights of rank 0, and what the optimizer keeps for them.

    All ranks teleport on the same data and should agree already; this makes it certain where kernels differ in the last bit.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    state = {} if optimizer is None else optimizer.state
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)
            for value in state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.device == parameter.device:
                    dist.broadcast(value, src=0)
