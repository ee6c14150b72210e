"""Optimizers of experiments: any by its name, several behind one object, learning rates by groups of parameters."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from hf_teleport.layers.roles import role_of
from hf_teleport.reporting.extras import require_extra

MUON_ADAMW = "muon+adamw"

# Other settings give these, or nobody does.
_NO_SETTINGS = {"self", "params", "lr", "weight_decay", "args", "kwargs"}

# Arguments for Trainer's optimizers that make groups of their own.
_OWN_GROUPS = {"params", "model", "optimizer_dict"}

Group = dict[str, Any]


class _InFloat32(TorchFunctionMode):
    """What torch would compute in bfloat16 is computed in float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class CPUMuon(torch.optim.Muon):
    """Muon with its Newton-Schulz iterations in float32: in bfloat16 many CPUs need ten times as long for them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of Muon."""
        with _InFloat32():
            return super().step(closure)


class CombinedOptimizer(Optimizer):
    """Several optimizers behind one object, each for parameters of its own.

    `param_groups` and `state` are those of all `parts`, so that a scheduler changes all learning rates, and `state_dict` and
    `load_state_dict` are complete.

        CombinedOptimizer(torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-4))

    Raises:
        ValueError: no parts, or a parameter in two of them.
    """

    def __init__(self, *parts: Optimizer):
        if not parts:
            raise ValueError("parts = () is not allowed; allowed: one optimizer or more.")
        self.parts = parts
        # The groups are the parts' own objects, not copies, and so is the state of each parameter.
        super().__init__([group for part in parts for group in part.param_groups], {})

    @property
    def state(self) -> Any:
        """The parts' state of each parameter."""
        return {parameter: kept for part in self.parts for parameter, kept in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Optimizer's constructor sets an empty state."""

    def add_param_group(self, param_group: Group) -> None:
        """Refused but for the groups of the parts.

        Raises:
            ValueError: it is no part's.
        """
        if not any(param_group is group for part in self.parts for group in part.param_groups):
            raise ValueError("a group of parameters is not allowed here; add it to an optimizer before it is combined.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each part gets its groups, in the order of the parts, and what is kept for their parameters.

        Raises:
            ValueError: other groups than there are.
        """
        saved, groups = state_dict["state"], list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"{len(groups)} groups of parameters are not allowed; allowed: {len(self.param_groups)}, as there are."
            )
        for part in self.parts:
            own = [groups.pop(0) for _ in part.param_groups]
            kept = {index for group in own for index in group["params"]}
            part.load_state_dict({"state": {i: saved[i] for i in saved if i in kept}, "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of every part; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "param_groups": self.param_groups, "parts": self.parts}


def optimizer_class(name: str) -> type[Optimizer]:
    """A class of torch.optim or, if there is none, of pytorch_optimizer; of 'muon+adamw' Muon's.

    Raises:
        ValueError: there is no such class.
        ModuleNotFoundError: it is none of torch.optim, and pytorch_optimizer is not installed.
    """
    if name == MUON_ADAMW:
        return torch.optim.Muon
    found = _optimizers(torch.optim)
    if name not in found:
        found |= _optimizers(require_extra("pytorch_optimizer"))
    if name not in found:
        near = difflib.get_close_matches(name, [MUON_ADAMW, *found], n=1, cutoff=0)
        raise ValueError(
            f"optimizer = {name!r} is not allowed; allowed: {MUON_ADAMW!r}, or a class of torch.optim or of pytorch_optimizer; "
            f"the nearest is {near[0]!r}."
        )
    return found[name]


def _optimizers(module: Any) -> dict[str, type[Optimizer]]:
    found = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    return {name: kind for name, kind in found.items() if kind is not Optimizer}


def accepted(kind: type[Optimizer]) -> list[str]:
    """Keyword settings of an optimizer, without the learning rate and weight decay, which groups of parameters have."""
    return sorted(inspect.signature(kind).parameters.keys() - _NO_SETTINGS)


def outer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of embeddings and of the output head. The head is the one that the model names, or layers with a
    head's name.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [head] if head is not None else [module for name, module in model.named_modules() if role_of(name, "") == "head"]
    return {parameter for module in modules for parameter in module.parameters()}


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers between the embeddings and the output head."""
    linear: set[Any] = {module.weight for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    return linear - outer_parameters(model)


def parameter_groups(model: nn.Module, arguments: Any) -> list[Group]:
    """Groups of equal learning rate and weight decay, hidden matrices apart (`hidden`) and those at the learning rate first.

    As in Trainer, biases and the gains of norms have no weight decay.

    Args:
        arguments: the settings, `ExperimentArguments`.

    Raises:
        ValueError: a pattern that no parameter's name has.
    """
    outer, hidden = outer_parameters(model), hidden_matrices(model)
    patterns: dict[str, float] = arguments.parameter_learning_rates or {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"parameter_learning_rates has {pattern!r}, which is in no parameter's name; there are {names}.")
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        default = (arguments.embedding_learning_rate if parameter in outer else None) or arguments.learning_rate
        rate = next((rate for pattern, rate in patterns.items() if re.search(pattern, name)), default)
        key = parameter in hidden, rate, arguments.weight_decay if name in decayed else 0.0
        found.setdefault(key, []).append(parameter)
    groups = [{"params": params, "lr": r, "weight_decay": d, "hidden": h} for (h, r, d), params in found.items()]
    # Trainer logs the rate of the first group.
    return sorted(groups, key=lambda group: group["lr"] != arguments.learning_rate)


def make_optimizer(model: nn.Module, arguments: Any) -> Optimizer:
    """The optimizer of the settings, `ExperimentArguments`, for the parameters of a model that are trained.

    Raises:
        ValueError: an optimizer that does not take its settings, or that does not suit the model.
    """
    groups = parameter_groups(model, arguments)
    hidden = [_without_mark(group) for group in groups if group["hidden"]]
    others = [_without_mark(group) for group in groups if not group["hidden"]]
    settings: dict[str, Any] = dict(arguments.optimizer_settings or {})
    if arguments.optimizer == MUON_ADAMW:
        if not hidden:
            raise ValueError(f"optimizer = {MUON_ADAMW!r} is not allowed: the model has no hidden matrices; take 'AdamW'.")
        muons = CPUMuon if arguments.device.type == "cpu" else torch.optim.Muon
        muon = muons(hidden, **{"adjust_lr_fn": "match_rms_adamw", **settings})
        betas = arguments.adam_beta1, arguments.adam_beta2
        return CombinedOptimizer(muon, torch.optim.AdamW(others, betas=betas, eps=arguments.adam_epsilon)) if others else muon
    if arguments.optimizer is None:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if not isinstance(kind, type) or settings.keys() & _OWN_GROUPS:
            raise ValueError(
                f"optim = {arguments.optim!r} makes its own groups of parameters: leave embedding_learning_rate and "
                "parameter_learning_rates out."
            )
    else:
        kind = optimizer_class(arguments.optimizer)
        settings = _adam_settings(kind, arguments) | {"lr": arguments.learning_rate} | settings
    try:
        return kind([*hidden, *others], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer = {kind.__name__!r} with {settings} is not allowed: {error}") from error


def _without_mark(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "hidden"}


def _adam_settings(kind: type[Optimizer], arguments: Any) -> dict[str, Any]:
    """Betas and epsilon if the settings have them; else the optimizer's own."""
    taken = inspect.signature(kind).parameters
    found: dict[str, Any] = {}
    given = [arguments.adam_beta1, arguments.adam_beta2]
    if any(beta is not None for beta in given):
        own = taken["betas"].default
        found["betas"] = tuple(default if beta is None else beta for beta, default in zip(given, own, strict=False))
    if arguments.adam_epsilon is not None and "eps" in taken:
        found["eps"] = arguments.adam_epsilon
    return found
