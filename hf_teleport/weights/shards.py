"""Weights that stay sharded by FSDP2 in an event. Each is whole only while its module runs.

In the model a `Shard` stands in for each such weight. It has this process's part of the values. So have all tensors that an event
makes of it: copies to restore, gradients, moves, shifted weights. While its FSDP module runs, forwards or backwards, the `Shard`
is the whole weight. Then it may receive a gradient, or another product of its layer's inputs. When the module is closed, that
tensor is averaged over the processes, and each keeps its part.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as Split
from torch.nn import functional as F

from hf_teleport.weights.norms import wide_norm
from hf_teleport.weights.ranks import Ranks
from hf_teleport.weights.region import Region
from hf_teleport.weights.whole import Arrived, Weights

_APART = "the processes' forwards or backwards go through different sharded modules."


class Shard(nn.Parameter):
    """A parameter that has this process's part of a weight. While its module runs it has the whole weight.

    Attributes:
        whole: a tensor without values that has the whole weight's shape, strides and dtype.
    """

    whole: Tensor

    @classmethod
    def of(cls, stored: Any) -> "Shard":
        """A stand-in for a sharded parameter. It shares the memory, or is a copy in float32 for lower precisions."""
        own = stored.to_local().detach()
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        shard = cls(own, stored.requires_grad)
        shard.whole = torch.empty_strided(stored.shape, stored.stride(), dtype=own.dtype, device="meta")
        return shard


def whole_of(parameter: Tensor) -> Tensor:
    """A tensor with the shape and the strides of the whole parameter."""
    return parameter.whole if isinstance(parameter, Shard) else parameter


def own_rows(whole: Tensor, size: int, rank: int) -> Tensor:
    """One process's part of a tensor, as FSDP2 splits the first axis."""
    parts = whole.chunk(size)
    return parts[rank] if rank < len(parts) else whole[:0]


def can_stay_sharded(model: nn.Module, size: int) -> bool:
    """Whether every weight is sharded by its first axis over all processes, and all will have the same dtype."""
    parameters: list[Any] = list(model.parameters())
    return len({torch.promote_types(p.dtype, torch.float32) for p in parameters}) == 1 and all(
        isinstance(p, DTensor) and p.placements == (Split(0),) and p.device_mesh.size() == size for p in parameters
    )


class Shards(Weights):
    """The weights of a model that stay sharded in an event.

    Args:
        ranks: the processes.
        stored: for each of the model's parameters, which are `Shard`s, the sharded parameter that it replaces.
        model: the model.
    """

    whole: ClassVar[bool] = False

    def __init__(self, ranks: Ranks, stored: dict[nn.Parameter, Any], model: nn.Module):
        super().__init__(ranks, stored)
        self._mesh = next(iter(stored.values())).device_mesh  # the processes in the order of their parts
        self._around: dict[nn.Parameter, tuple[nn.Module, ...]] = {}  # the FSDP modules that a weight is in, outermost first
        self._place(model, ())
        self._units = list(dict.fromkeys([(model,), *self._around.values()]))
        self._parts: dict[nn.Parameter, Tensor] = {}  # this process's parts of the weights that are whole now
        self._open: list[tuple[nn.Module, ...]] = []
        self._arrived: Arrived | None = None
        self._means: dict[nn.Parameter, Tensor] = {}
        self._hooks = []
        for unit in self._units[1:]:
            self._hooks.append(unit[-1].register_forward_pre_hook(lambda *_, unit=unit: self._make_whole(unit)))
            self._hooks.append(unit[-1].register_forward_hook(lambda *_, unit=unit: self._close(unit)))
        for parameter, unit in self._around.items():
            if parameter.requires_grad:
                # A gradient has the shape of the whole weight, so open the module, even if backward did not read the weight.
                self._hooks.append(parameter.register_hook(lambda _, unit=unit: self._make_whole(unit)))

    def _place(self, module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        if isinstance(module, FSDPModule) or not around:
            around = (*around, module)
        for parameter in module.parameters(recurse=False):
            known = self._around.get(parameter, around)
            # A tied weight belongs to the innermost module that contains all its users.
            self._around[parameter] = tuple(a for a, b in zip(known, around, strict=False) if a is b)
        for child in module.children():
            self._place(child, around)

    def release(self) -> None:
        """Remove the hooks at the end of the event."""
        for hook in self._hooks:
            hook.remove()

    def norms(self, tensors: Iterable[Tensor]) -> list[float]:
        """The norm of each whole tensor. This process has a part of each."""
        return self.joined([wide_norm(t.detach()) for t in tensors])

    def joined(self, lengths: list[float]) -> list[float]:
        """The norms of whole tensors, from the norms of this process's parts."""
        return [(mean * self.ranks.size) ** 0.5 for mean in self.ranks.mean([length**2 for length in lengths])]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a forward and its backward. Weights become whole when they are needed. After an error none stays whole."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                self._make_whole(self._units[0])
                yield
                for unit in reversed(self._open.copy()):
                    self._close(unit)
        finally:
            for parameter, part in self._parts.items():
                parameter.data = part
            self._parts, self._open = {}, []

    def in_order(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters in the model's order."""
        wanted = set(parameters)
        return [parameter for parameter in self._around if parameter in wanted]

    @contextmanager
    def reading(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, these parameters are whole."""
        parts = {parameter: parameter.data for parameter in self.in_order(parameters)}
        self.vote()
        try:
            with torch.no_grad():
                for parameter, whole in zip(parts, self._gathered(parts), strict=True):
                    parameter.data = whole
            yield
        finally:
            for parameter, part in parts.items():
                parameter.data = part

    @contextmanager
    def changing(self, parameter: nn.Parameter, axes: Collection[int], state: Mapping[Any, Any] | None = None) -> Iterator[None]:
        """Inside, the parameter and its state are whole if rows are mixed. Afterwards this process keeps its parts."""
        kept: dict[Any, Any] = {} if state is None else state.get(self._stored[parameter], {})
        kept = {name: value for name, value in kept.items() if isinstance(value, DTensor)}
        if 0 not in axes and all(_lies_as(value, self._stored[parameter]) for value in kept.values()):
            yield
            return
        own: Any = {} if state is None else state.get(parameter, {})
        part, parts = parameter.data, {name: own[name] for name in kept}
        try:
            with self.reading([parameter]), torch.no_grad():
                for name, value in kept.items():
                    self.vote()
                    own[name] = value.full_tensor()
                yield
                part.copy_(self._own_rows(parameter.data))
                for name, value in kept.items():
                    put(value, own[name])
        finally:
            own.update(parts)

    def gathered(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """The whole tensor, from the parts of all processes."""
        self.vote()
        return self._gathered({parameter: values.detach()})[0]

    def changed(
        self, parameter: nn.Parameter, values: Tensor, axes: Collection[int], change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """This process's part of the changed values. If rows are mixed, the change is applied to the whole tensor."""
        return self._own_rows(change(self.gathered(parameter, values))).clone() if 0 in axes else change(values)

    def laid_out(self, values: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Any]:
        """The values as sharded tensors."""
        found = {}
        for parameter, part in values.items():
            whole = whole_of(parameter)
            found[parameter] = DTensor.from_local(
                part.detach(), self._mesh, [Split(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        return found

    def vote(self) -> None:
        """Make sure that all processes have come here, and none has failed."""
        self.ranks.agree(2 + len(self._units) + len(self._around), _APART)

    def _own_rows(self, whole: Tensor) -> Tensor:
        return own_rows(whole, self.ranks.size, self._mesh.get_local_rank())

    @contextmanager
    def averaging(self, arrived: Arrived) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Inside `running`: when weights are closed, what they have received is averaged over the processes."""
        self._arrived, self._means = arrived, {}
        try:
            yield self._means
            self._average([p for p in self._around if p.requires_grad])
        finally:
            self._arrived = None

    def gradients(
        self,
        forward: Callable[[], Tensor],
        parameters: list[nn.Parameter],
        see: Callable[[nn.Parameter, Tensor], None],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """As for whole weights, but a process does not keep its own gradients. It keeps its parts of the means."""

        def arrived(parameter: nn.Parameter) -> Tensor | None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                see(parameter, gradient)
            return gradient

        def forward_and_backward() -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
            with self.running():
                loss = forward()
                with self.averaging(arrived) as means:
                    loss.backward(inputs=parameters)
                return loss.detach(), means

        loss, means = self.ranks.together(forward_and_backward)
        return loss, [], [means.get(parameter) for parameter in parameters]

    def _make_whole(self, unit: tuple[nn.Module, ...]) -> None:
        if unit in self._open:
            return
        for other in [other for other in self._open if other != unit[: len(other)]]:
            self._close(other)  # the backward is done with it
        self.ranks.agree(1 + self._units.index(unit), _APART)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            parts = {parameter: parameter.data for parameter in self._of(unit)}
            for parameter, whole in zip(parts, self._gathered(parts), strict=True):
                parameter.data = whole
            self._parts |= parts
        self._open.append(unit)

    def _close(self, unit: tuple[nn.Module, ...]) -> None:
        if unit not in self._open:
            return
        if self._arrived is not None:
            self._average([parameter for parameter in self._of(unit) if parameter.requires_grad])
        with torch._C.DisableTorchFunction():
            for parameter in self._of(unit):
                parameter.data = self._parts.pop(parameter)
        self._open.remove(unit)

    def _of(self, unit: tuple[nn.Module, ...]) -> list[Any]:
        return [parameter for parameter, around in self._around.items() if around == unit]

    def _average(self, parameters: list[Any]) -> None:
        """Average what these weights have received, and keep this process's part."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            values = [self._arrived(parameter) for parameter in parameters]  # type: ignore[misc]
            self.ranks.agree(1 + len(self._units) + len(parameters), _APART)
            present = torch.tensor([value is not None for value in values], dtype=torch.uint8, device=self.ranks.device)
            dist.all_reduce(present, dist.ReduceOp.MAX)
            some = [(p, value) for p, value, here in zip(parameters, values, present.tolist(), strict=True) if here]
            for parameter, part in self._scattered(dict(some)):
                known = self._means.get(parameter)
                self._means[parameter] = part if known is None else known.add_(part)

    def _gathered(self, parts: Mapping[Any, Tensor]) -> list[Tensor]:
        """The whole values of tensors that are sharded like these weights, by one message."""
        if not parts:
            return []
        rooms = [self._room(parameter) for parameter in parts]
        own = torch.cat([_padded(part, room) for part, room in zip(parts.values(), rooms, strict=True)])
        everybodys = DTensor.from_local(own, self._mesh, [Split(0)], run_check=False).full_tensor()
        columns = everybodys.view(self.ranks.size, -1).split(rooms, dim=1)
        return [
            column.reshape(-1)[: parameter.whole.numel()].view(parameter.whole.shape)
            for parameter, column in zip(parts, columns, strict=True)
        ]

    def _scattered(self, values: dict[Any, Tensor | None]) -> list[tuple[Any, Tensor]]:
        """This process's parts of the means of whole values, by one message. None counts as zeros."""
        if not values:
            return []
        size, rooms = self.ranks.size, [self._room(parameter) for parameter in values]
        wholes = [
            _padded(parameter.data.new_zeros(0) if value is None else value, size * room).view(size, room)
            for (parameter, value), room in zip(values.items(), rooms, strict=True)
        ]
        everybodys = DTensor.from_local(torch.cat(wholes, dim=1).flatten(), self._mesh, [Partial()], run_check=False)
        own = everybodys.redistribute(placements=[Split(0)]).to_local() / size
        shapes = [self._parts.get(parameter, parameter.data).shape for parameter in values]
        return [
            (parameter, part[: shape.numel()].view(shape))
            for parameter, part, shape in zip(values, own.split(rooms), shapes, strict=True)
        ]

    def _room(self, parameter: Shard) -> int:
        """The largest number of elements of a weight that a process has. `torch.chunk` splits the rows."""
        return -(-len(parameter.whole) // self.ranks.size) * parameter.whole[:1].numel()

    def _pack(self, tensor: Tensor) -> Any:
        """Save for backward: for a whole weight or a view of it, save only a reference."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage().data_ptr()
            for parameter in self._parts:
                if storage and parameter.untyped_storage().data_ptr() == storage:
                    return parameter, Region.of(tensor, parameter)
            # Detached, because a node that keeps its own output is a reference cycle that the garbage collector can't free.
            return tensor.detach()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parameter, region = packed
        self._make_whole(self._around[parameter])
        with torch._C.DisableTorchFunction():
            return region.view(parameter.detach())


@torch.no_grad()
def put(stored: Any, values: Tensor) -> None:
    """Copy whole values into a tensor. A sharded tensor gets this process's part of them."""
    if not isinstance(stored, DTensor):
        stored.copy_(values)
        return
    mesh = stored.device_mesh
    everywhere = DTensor.from_local(values.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    stored.to_local().copy_(everywhere.redistribute(placements=stored.placements).to_local())


def _lies_as(value: Any, stored: Any) -> bool:
    """Whether a sharded tensor is sharded in the same way as a weight."""
    return value.shape == stored.shape and value.placements == stored.placements


def _padded(values: Tensor, size: int) -> Tensor:
    return F.pad(values.flatten(), (0, size - values.numel()))
