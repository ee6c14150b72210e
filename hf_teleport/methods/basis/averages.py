"""Averages of a model's weights (EMA, SWA), which a change of basis turns along with the weights.

An average has norms with gains of its own, and they are folded into its own readers. So what the average computes stays as it is,
and what it goes on averaging is in the same coordinates.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from hf_teleport.layers.roles import parameters_by_name, plain_name
from hf_teleport.methods.basis.features import uniform
from hf_teleport.methods.basis.symmetry import Symmetry

# Of timm, which need not be installed. TRL's callbacks follow below, by their names too.
_EMA_MODELS = ("ModelEma", "ModelEmaV2", "ModelEmaV3")


class Average:
    """What stands for each parameter of a model in an average of its weights.

    Args:
        model: whose weights are averaged.
        given: a module with parameters of the same names, `AveragedModel` and the like included; or tensors by these names.

    Raises:
        ValueError: a trained parameter is missing, has another shape, or is sharded; a tensor is the model's own, or weights that
            are tied in the model are two tensors.
    """

    def __init__(self, model: nn.Module, given: nn.Module | Mapping[str, Tensor]):
        known = _tensors(given)
        self.kind = type(given).__name__
        self._own: dict[nn.Parameter, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            name = plain_name(name)
            tensor = known.get(name)
            if tensor is None and not parameter.requires_grad:
                continue
            if tensor is None or tensor.shape != parameter.shape:
                found = "is missing" if tensor is None else f"has the shape {list(tensor.shape)} and not {list(parameter.shape)}"
                raise ValueError(
                    f"the average ({self.kind}) can't turn along: {name} {found}. Give a module with the model's parameters, or "
                    "a dict with a tensor for each name of model.named_parameters()."
                )
            if isinstance(tensor, DTensor):
                raise ValueError(
                    f"the average ({self.kind}) can't turn along: FSDP2 shards it. Begin to average after the last teleport, or "
                    "use teleport_method='null_space'."
                )
            if not isinstance(parameter, DTensor) and tensor.data_ptr() == parameter.data_ptr():
                raise ValueError(
                    f"the average ({self.kind}) has the model's own {name}, which turns anyway. Give tensors of its own."
                )
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self._own[parameter] = own
        for name, parameter in model.named_parameters(remove_duplicate=False):
            twin = known.get(plain_name(name))
            if parameter in self._own and twin is not None and twin.data_ptr() != self._own[parameter].data_ptr():
                raise ValueError(
                    f"the average ({self.kind}) can't turn along: {plain_name(name)} is tied in the model and not in the "
                    "average. Leave it out, as model.named_parameters() does."
                )

    def __call__(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter of the model."""
        return self._own[parameter]

    @property
    def places(self) -> set[int]:
        """Where its tensors lie in memory."""
        return {own.data_ptr() for own in self._own.values()}

    def objection(self, symmetry: Symmetry) -> str:
        """Why a symmetry of the model can't be turned in the average; empty: it can."""
        if any(parameter not in self._own for parameter in symmetry.parameters):
            return f"the average ({self.kind}) lacks frozen weights that it turns; give it all of the model's parameters"
        if not all(uniform(self(gain)) for gain in symmetry.blocking):
            return f"the average ({self.kind}) has an uneven gain in it that cannot be folded"
        return ""


def averages_of(trainer: Any) -> Iterator[nn.Module | Mapping[str, Tensor]]:
    """The averages of torch, timm and TRL that a trainer or a callback keeps as an attribute, or a callback in a list or dict."""
    for keeper in (trainer, *trainer.callback_handler.callbacks):
        values = vars(keeper).values()
        # A trainer's list may be its data set.
        for value in values if keeper is trainer else chain.from_iterable(map(_elements, values)):
            if isinstance(value, AveragedModel) or type(value).__name__ in _EMA_MODELS:
                yield value
        kinds = {base.__name__ for base in type(keeper).__mro__}
        if "SyncRefModelCallback" in kinds:
            yield keeper.ref_model
        if "BEMACallback" in kinds and keeper.running_model is not None:
            yield keeper.running_model
            yield dict(zip(keeper.param_names, keeper.ema_params, strict=True))
            yield dict(zip(keeper.param_names, keeper.theta0_params, strict=True))


def taken_in(model: nn.Module, given: Iterable[nn.Module | Mapping[str, Tensor]]) -> list[Average]:
    """The averages, each once: an `AveragedModel` and a dict of its parameters are the same."""
    averages: list[Average] = []
    for average in sorted((Average(model, each) for each in given), key=lambda average: -len(average.places)):
        if not any(average.places <= other.places for other in averages):
            averages.append(average)
    return averages


def _elements(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else [value]


def _tensors(given: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(given, Mapping):
        return {plain_name(name): tensor for name, tensor in given.items()}
    inner = getattr(given, "module", getattr(given, "ema", None))
    return dict(parameters_by_name(inner if isinstance(inner, nn.Module) else given))
