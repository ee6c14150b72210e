"""Optimizers of experiments: chosen by name, combined into one object, with learning rates for groups of parameters."""

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

from hf_teleport.layers.roles import end_layer, role_of
from hf_teleport.reporting.extras import require_extra

MUON_ADAMW = "muon+adamw"

# Parameters of an optimizer's constructor that `optimizer_settings` must not give.
_NO_SETTINGS = {"self", "params", "lr", "weight_decay", "args", "kwargs"}

# Arguments of Trainer's optimizers that make their own groups of parameters.
_OWN_GROUPS = {"params", "model", "optimizer_dict"}

Group = dict[str, Any]


class _InFloat32(TorchFunctionMode):
    """Inside, `Tensor.bfloat16` returns float32, so torch computes in float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class CPUMuon(torch.optim.Muon):
    """Muon with its Newton-Schulz iterations in float32. In bfloat16 they take ten times as long on many CPUs."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of Muon."""
        with _InFloat32():
            return super().step(closure)


class CombinedOptimizer(Optimizer):
    """Several optimizers in one object. Each has its own parameters.

    `param_groups` and `state` contain those of all `parts`. So a scheduler changes all learning rates, and `state_dict` and
    `load_state_dict` are complete.

        CombinedOptimizer(torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-4))

    Raises:
        ValueError: there are no parts, or two parts have the same parameter.
    """

    def __init__(self, *parts: Optimizer):
        if not parts:
            raise ValueError("parts = () is not allowed; allowed: one optimizer or more.")
        self.parts = parts
        # Groups and states are the parts' own objects and not copies.
        super().__init__([group for part in parts for group in part.param_groups], {})

    @property
    def state(self) -> Any:
        """The state of each parameter, from all parts."""
        return {parameter: kept for part in self.parts for parameter, kept in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored. The constructor of `Optimizer` sets an empty state."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of one of the parts. Other groups are refused.

        Raises:
            ValueError: the group belongs to no part.
        """
        if not any(param_group is group for part in self.parts for group in part.param_groups):
            raise ValueError("a group of parameters is not allowed here; add it to an optimizer before it is combined.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each part's groups, in the order of the parts, and the states of their parameters.

        Raises:
            ValueError: the number of groups differs.
        """
        saved, groups = state_dict["state"], list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"{len(groups)} groups of parameters are not allowed; allowed: {len(self.param_groups)}, as this optimizer has."
            )
        for part in self.parts:
            own = [groups.pop(0) for _ in part.param_groups]
            kept = {index for group in own for index in group["params"]}
            part.load_state_dict({"state": {i: saved[i] for i in saved if i in kept}, "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of every part. Returns the closure's result."""
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
    """The class of this name in torch.optim, or else in pytorch_optimizer. For 'muon+adamw' it is Muon.

    Raises:
        ValueError: there is no such class.
        ModuleNotFoundError: torch.optim has no such class, and pytorch_optimizer is not installed.
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
    """The keyword settings of an optimizer, without learning rate and weight decay, which belong to groups of parameters."""
    return sorted(inspect.signature(kind).parameters.keys() - _NO_SETTINGS)


def outer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of embeddings and output head. The head is the model's own, or all layers with a head's name."""
    head = end_layer(model, "output")
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [head] if head is not None else [module for name, module in model.named_modules() if role_of(name, "") == "head"]
    return {parameter for module in modules for parameter in module.parameters()}


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers between the embeddings and the output head."""
    linear: set[Any] = {module.weight for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    return linear - outer_parameters(model)


def parameter_groups(model: nn.Module, arguments: Any) -> list[Group]:
    """Groups of parameters with equal learning rate and weight decay. Hidden matrices have their own groups (`hidden`).

    As in Trainer, biases and the gains of norms have no weight decay. Groups with the plain learning rate come first.

    Args:
        arguments: the settings, `ExperimentArguments`.

    Raises:
        ValueError: a pattern is found in no parameter's name.
    """
    outer, hidden = outer_parameters(model), hidden_matrices(model)
    patterns: dict[str, float] = arguments.parameter_learning_rates or {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"parameter_learning_rates has {pattern!r}, which is in no parameter's name; the names are {names}.")
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
    # Trainer logs the learning rate of the first group.
    return sorted(groups, key=lambda group: group["lr"] != arguments.learning_rate)


def make_optimizer(model: nn.Module, arguments: Any) -> Optimizer:
    """Make the optimizer that the settings (`ExperimentArguments`) name, for a model's trainable parameters.

    Raises:
        ValueError: the optimizer does not take its settings, or does not suit the model.
    """
    hidden: list[Group] = []
    others: list[Group] = []
    for group in parameter_groups(model, arguments):
        (hidden if group.pop("hidden") else others).append(group)
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
                f"optim = {arguments.optim!r} makes its own groups of parameters: leave out embedding_learning_rate and "
                "parameter_learning_rates."
            )
    else:
        kind = optimizer_class(arguments.optimizer)
        settings = _adam_settings(kind, arguments) | {"lr": arguments.learning_rate} | settings
    try:
        return kind([*hidden, *others], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer = {kind.__name__!r} with {settings} is not allowed: {error}") from error


def _adam_settings(kind: type[Optimizer], arguments: Any) -> dict[str, Any]:
    """Betas and epsilon, as far as the settings give them. What is missing keeps the optimizer's default."""
    taken = inspect.signature(kind).parameters
    found: dict[str, Any] = {}
    given = [arguments.adam_beta1, arguments.adam_beta2]
    if any(beta is not None for beta in given):
        own = taken["betas"].default
        found["betas"] = tuple(default if beta is None else beta for beta, default in zip(given, own, strict=False))
    if arguments.adam_epsilon is not None and "eps" in taken:
        found["eps"] = arguments.adam_epsilon
    return found
