"""Several processes that teleport together: each has its share of the data, and all hold the same weights.

Whatever decides something (a loss, a gradient norm, which weights may move) is computed from all processes' numbers. It is equal
on all of them, so that no process decides differently. If one fails, all learn of it and stop.
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
    """Make sure that each process holds the whole model, or the shards of FSDP2, which can be gathered.

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
            "teleportation does not work with weights that FSDP2 keeps on the CPU, because an event computes where they are. Set "
            "`fsdp_offload_params` (in fsdp_config: `cpu_offload`) to false, or teleport_epochs to 0."
        )
    if getattr(accelerator, "parallelism_config", None) and accelerator.parallelism_config.tp_enabled:
        raise ValueError(
            "teleportation does not work with tensor parallelism, because its weights are split over processes. Use data "
            "parallelism (DDP) or FSDP2, or set teleport_epochs to 0."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that some device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


class Ranks:
    """The processes of the default group, or this one alone. Every method but `spread` must be called by all alike.

    Args:
        device: where the tensors live that are sent.
        several: False: this process alone, whatever others there are.

    Attributes:
        size: how many there are.
        rank: the number of this one.
    """

    def __init__(self, device: torch.device | str = "cpu", several: bool = True):
        several = several and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self.device = torch.device(device)

    def together(self, work: Callable[[], _T]) -> _T:
        """What `work` returns; if it fails in any process, an error in all of them.

        Raises:
            OutOfMemoryError: another process ran out of memory.
            RuntimeError: another process failed otherwise.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as own:
            if own.__dict__.pop("is_known", False):
                raise  # by `agree`, so in all processes
            error = own
        problem = self._problem(error=error)
        if error or problem:
            raise error or problem  # type: ignore[misc]
        return result

    def agree(self, on: int, apart: str) -> None:
        """In the midst of what runs `together`, before all communicate: go on only if all are here and none has failed.

        Args:
            on: what is to be done next: a number above 0, the same everywhere.
            apart: what it means if the processes are about to do different things.

        Raises:
            As `together`; and RuntimeError: the processes are about to do different things.
        """
        if problem := self._problem(on, apart):
            problem.is_known = True  # type: ignore[attr-defined]
            raise problem

    def _problem(self, on: int = 0, apart: str = "", error: Exception | None = None) -> Exception | None:
        """What keeps the processes from going on, or from being done with their work (0), besides this one's own error."""
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
        """The mean over all processes of each value."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.size).tolist()

    def mean_tensors(self, tensors: list[Tensor | None], like: Iterable[Tensor]) -> list[Tensor | None]:
        """The mean over all processes of each tensor, None counting as zeros; None where every process has none.

        Args:
            like: for each, a tensor of its shape and dtype.
        """
        if self.size == 1:
            return tensors
        present = torch.tensor([t is not None for t in tensors], dtype=torch.uint8, device=self.device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        means: list[Tensor | None] = []
        for tensor, other, some in zip(tensors, like, present.tolist(), strict=True):
            mean = None
            if some:
                own = torch.zeros_like(other) if tensor is None else tensor.detach()
                mean = own.clone(memory_format=torch.contiguous_format)
                dist.all_reduce(mean)
                mean /= self.size
            means.append(mean)
        return means

    def gather(self, value: _T) -> list[_T]:
        """Every process's value, in the order of ranks. Any Python object that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Give every process the values that the source has, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous().to(self.device)
            dist.broadcast(whole, source)
            tensor.detach().copy_(whole)

    def spread(self, costs: list[float]) -> list[int]:
        """Who does which job, as `spread` has it."""
        return spread(costs, self.size)


def spread(costs: list[float], processes: int) -> list[int]:
    """Who does which job: each job in turn, the longest first, goes to the process with the least to do."""
    loads = [0.0] * processes
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


ALONE = Ranks(several=False)
"""One process, on data of its own."""
