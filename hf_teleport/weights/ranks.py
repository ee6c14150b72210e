"""Communication between the processes of an event. Each has its share of the data, and all have the same weights.

Every value that a decision depends on (a loss, a gradient norm, which weights may move) is computed from the numbers of all
processes. So it is equal on all of them, and they decide alike. If one process fails, all of them stop with an error.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

_T = TypeVar("_T")

_SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


def check_strategy(accelerator: Any) -> None:
    """Make sure that each process has the whole model, or shards of FSDP2, which can be gathered.

    Raises:
        ValueError: the weights are split in another way, or are not on the device that computes.
    """
    kind = accelerator.distributed_type
    is_fsdp2 = getattr(accelerator, "is_fsdp2", False)
    if kind not in _SUPPORTED and not is_fsdp2:
        raise ValueError(
            f"teleportation does not work with {kind}, because its weights are split over processes. Use data parallelism "
            "(DDP: `accelerate launch --multi_gpu`) or FSDP2 (`fsdp_version: 2`), or set teleport_epochs to 0."
        )
    if is_fsdp2 and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "teleportation does not work with weights that FSDP2 keeps on the CPU, because an event computes on their device. "
            "Set `fsdp_offload_params` (in fsdp_config: `cpu_offload`) to false, or teleport_epochs to 0."
        )
    if getattr(accelerator, "parallelism_config", None) and accelerator.parallelism_config.tp_enabled:
        raise ValueError(
            "teleportation does not work with tensor parallelism, because its weights are split over processes. Use data "
            "parallelism (DDP) or FSDP2, or set teleport_epochs to 0."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


class Ranks:
    """The processes of the default group, or this process alone. All processes must call the same methods, except `spread`.

    Args:
        device: the device of the tensors that are sent.
        several: False: this process alone, even if there are others.

    Attributes:
        size: number of processes.
        rank: number of this process.
    """

    def __init__(self, device: torch.device | str = "cpu", several: bool = True):
        several = several and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self.device = torch.device(device)

    def together(self, work: Callable[[], _T]) -> _T:
        """Run `work` and return its result. If it fails on one process, raise an error on all of them.

        Raises:
            OutOfMemoryError: another process ran out of memory.
            RuntimeError: another process failed with another error.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as own:
            if own.__dict__.pop("is_known", False):
                raise  # raised by `agree`, so on all processes
            error = own
        problem = self._problem(error=error)
        if error or problem:
            raise error or problem  # type: ignore[misc]
        return result

    def agree(self, on: int, apart: str) -> None:
        """Before processes communicate inside `together`: continue only if all have come here and none has failed.

        Args:
            on: a number above 0 for the next operation. It must be the same on all processes.
            apart: the error message if the numbers differ.

        Raises:
            OutOfMemoryError, RuntimeError: as `together`. RuntimeError also if the numbers differ.
        """
        if problem := self._problem(on, apart):
            problem.is_known = True  # type: ignore[attr-defined]
            raise problem

    def _problem(self, on: int = 0, apart: str = "", error: Exception | None = None) -> Exception | None:
        """The error to raise because of other processes: one failed, or their next operations differ. `on` = 0: work is done."""
        status = 0 if error is None else 1 if out_of_memory(error) else 2
        said = torch.tensor([status, on, -on], dtype=torch.float64, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        worst, last, first = said.tolist()
        if worst:
            problem = "ran out of memory" if worst == 1 else "failed"
            kind = torch.OutOfMemoryError if worst == 1 else RuntimeError
            return kind(f"another process {problem} in this teleport; its own message says where.")
        if last != -first:
            return RuntimeError(apart)
        return None

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each value over all processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.size).tolist()

    def mean_tensors(self, tensors: list[Tensor | None], like: Iterable[Tensor]) -> list[Tensor | None]:
        """The mean of each tensor over all processes. None counts as zeros. The mean is None if all processes have None.

        Args:
            like: for each tensor, another one with its shape and dtype.
        """
        if self.size == 1:
            return tensors
        present = torch.tensor([t is not None for t in tensors], dtype=torch.uint8, device=self.device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        own = {
            i: torch.zeros_like(other) if tensor is None else tensor.detach()
            for i, (tensor, other, some) in enumerate(zip(tensors, like, present.tolist(), strict=True))
            if some
        }
        means: list[Tensor | None] = [None] * len(tensors)
        # All tensors of a dtype are one message, because a message costs more time than most tensors in it.
        for dtype in dict.fromkeys(tensor.dtype for tensor in own.values()):
            sent = {i: tensor for i, tensor in own.items() if tensor.dtype == dtype}
            sums = torch.cat([tensor.flatten() for tensor in sent.values()])
            dist.all_reduce(sums)
            sums /= self.size
            for i, mean in zip(sent, sums.split([tensor.numel() for tensor in sent.values()]), strict=True):
                means[i] = mean.view(sent[i].shape)
        return means

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, in the order of ranks. A value is any Python object that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Copy the source's values to all processes, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous().to(self.device)
            dist.broadcast(whole, source)
            tensor.detach().copy_(whole)

    def spread(self, costs: list[float]) -> list[int]:
        """Assign jobs to these processes, by the function `spread`."""
        return spread(costs, self.size)


def spread(costs: list[float], processes: int) -> list[int]:
    """Assign jobs to processes. Each job in turn, the longest first, goes to the process with the least work so far."""
    loads = [0.0] * processes
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


ALONE = Ranks(several=False)
"""This process alone, without communication."""
