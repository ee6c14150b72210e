"""Follow parameters through a forward pass: which operation consumes each, with which input.

A `TorchFunctionMode` sees every torch call before it runs. Following the *operation* and not the module covers weights
that are used functionally while their module's forward never runs, needs no list of module classes, and notices every use
of a tied weight. Nothing is wrapped, patched or hooked on the model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_teleport.projectors import Call, projector_for


@dataclass
class Use:
    """One followed use of a weight, and the gradient D that backward leaves at its output."""

    call: Call
    output_gradient: Tensor | None = None


class Trace(TorchFunctionMode):
    """Record every use of the given parameters while the context is open.

    Attributes:
        uses: for each parameter that multiplied an input, its uses in the order of the calls.
        other_uses: for each parameter, the names of operations that consumed it and that no projector covers.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self._followed = {id(parameter): parameter for parameter in parameters}
        self.uses: dict[nn.Parameter, list[Use]] = defaultdict(list)
        self.other_uses: dict[nn.Parameter, set[str]] = defaultdict(set)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        touched = [self._followed[id(a)] for a in (*args, *kwargs.values()) if id(a) in self._followed]
        if touched:
            self._record(func, args, kwargs, touched, output)
        return output

    def _record(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], touched: list[nn.Parameter], output: Any
    ) -> None:
        family = projector_for(func)
        call = family.bind(*args, **kwargs) if family else None
        if call is not None and id(call.weight) in self._followed and isinstance(output, Tensor):
            weight = self._followed[id(call.weight)]
            self._see(weight, call, output)
            touched = [p for p in touched if p is not weight and p is not call.bias]
        # Attribute getters such as `weight.dtype` come here too: only what autograd follows is a use.
        if isinstance(output, Tensor) and output.requires_grad:
            for parameter in touched:
                self.other_uses[parameter].add(getattr(func, "__name__", str(func)))

    def _see(self, weight: nn.Parameter, call: Call, output: Tensor) -> None:
        use = Use(call)
        self.uses[weight].append(use)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(use, "output_gradient", gradient.detach()))


class TangentTrace(Trace):
    """Accumulate `Dᵀ (X' - X)` while a forward runs at shifted weights, X' being the shifted inputs.

    A weight whose calls come out differently (an expert that is sent other tokens at the shifted weights) gets no product.

    Args:
        base: the uses at the unshifted weights, with their D, of the parameters to follow.
    """

    def __init__(self, base: dict[nn.Parameter, list[Use]]):
        super().__init__(base)
        self._awaited = {weight: iter(uses) for weight, uses in base.items()}
        self._products: dict[nn.Parameter, Tensor] = {}
        self._mismatched: set[nn.Parameter] = set()

    def products(self) -> dict[nn.Parameter, Tensor]:
        """`Dᵀ (X' - X)` as (G, o, d), summed over the uses of each weight."""
        return {weight: product for weight, product in self._products.items() if weight not in self._mismatched}

    def _see(self, weight: nn.Parameter, call: Call, output: Tensor) -> None:
        use = next(self._awaited[weight], None)
        if use is None or call.input.shape != use.call.input.shape:
            self._mismatched.add(weight)
        elif use.output_gradient is not None:
            shift = call.input - use.call.input
            product = call.projector.weight_gradient(shift, use.output_gradient, tuple(weight.shape))
            known = self._products.get(weight)
            self._products[weight] = product if known is None else known + product


class KeepDouble(TorchFunctionMode):
    """Leave out casts of float64 to float32.

    Many models compute their norms and softmax in float32 whatever the weights are. To lower precisions that adds digits; from
    float64 it takes them away, and a small difference of two forwards would drown in the rounding.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)
