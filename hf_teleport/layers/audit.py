"""Decide which weights may move, by a check, and give a reason for the others.

A weight may move only if the trace has seen every use of it. The check: `Dᵀ X`, summed over the uses in the trace, must equal
autograd's own gradient of the weight. This catches tied weights, weights used functionally, custom scaling, and anything else.
"""

import difflib
import re
from collections import Counter

import torch
from torch import nn

from hf_teleport.config import TeleportConfig
from hf_teleport.layers.layer import Layer, bias_error, laid_out_like, weight_error
from hf_teleport.layers.point import Point
from hf_teleport.layers.roles import end_layer, plain_name, role_of
from hf_teleport.layers.trace import Use
from hf_teleport.report import LayerReport
from hf_teleport.weights.region import Region
from hf_teleport.weights.shards import whole_of

# Two ways to compute a gradient in float32 agree if they differ by at most this, relatively.
_AGREEMENT = 1e-3

# The suffix that PEFT adds to the name of a layer that it adapts: `q_proj.lora_A.default`, `q_proj.base_layer`.
_ADAPTER = re.compile(r"\.(lora_\w+(\.\w+)?|base_layer)$")

UNUSED = "the loss does not depend on it on the teleport data"
TIED_VIEWS = "tied: different views of the same elements multiply different inputs"


def audit(model: nn.Module, point: Point, config: TeleportConfig) -> tuple[list[Layer], dict[nn.Parameter, LayerReport]]:
    """Decide for each weight of the model whether it may move.

    Args:
        model: the model that has the weights.
        point: a traced forward and backward of the model.
        config: its `target_modules` and `exclude_modules` are used.

    Returns:
        The layers that may move, in the order in which the forward uses them, and a report for every parameter, in the model's
        order. A bias that moves with its layer is part of that layer's report.

    Raises:
        ValueError: `target_modules` or `exclude_modules` match nothing.
    """
    reports = describe(model, point, config)
    layers: list[Layer] = []
    for parameter, report in reports.items():
        parts = point.trace.uses.get(parameter, {})
        report.reason = report.reason or _why_not(parameter, parts, point)
        if report.reason:
            continue
        report.movable = True
        bias = _movable_bias([use for calls in parts.values() for use in calls], point) if len(parts) == 1 else None
        layers += [
            Layer(report.name, report.role, parameter, region, bias, calls[0].call.projector) for region, calls in parts.items()
        ]
    for layer in layers:
        if layer.bias is not None:
            del reports[layer.bias]
    order = {weight: i for i, weight in enumerate(point.trace.uses)}
    layers.sort(key=lambda layer: order[layer.weight])
    return layers, reports


def describe(
    model: nn.Module, point: Point, config: TeleportConfig, *, with_frozen: bool = False
) -> dict[nn.Parameter, LayerReport]:
    """A report for each parameter, in the model's order: its name, its role, and any reason that holds for all methods.

    Args:
        with_frozen: whether frozen weights may move too.

    Raises:
        ValueError: as `audit`.
    """
    head = end_layer(model, "output")
    owners = _owners(model)
    places = Counter(parameter.data_ptr() for parameter in owners)
    check_targets(config, [name for name, _, _ in owners.values()])
    reports: dict[nn.Parameter, LayerReport] = {}
    for parameter, (name, module, is_weight) in owners.items():
        use = next((use for calls in point.trace.uses.get(parameter, {}).values() for use in calls), None)
        if use is not None:
            own = re.sub(_ADAPTER, "", name)
            role = role_of(own, use.call.projector.role, is_head=module is head and is_weight)
        else:
            role = _role_of_other(module, name)
        report = reports[parameter] = LayerReport(name, role, list(whole_of(parameter).shape))
        if not parameter.requires_grad and not with_frozen:
            report.reason = "frozen: requires_grad is False"
        elif not selected(name, role, config):
            report.reason = "not selected by target_modules / exclude_modules"
        elif parameter.dtype not in (torch.float32, torch.float64):
            report.reason = (
                f"{parameter.dtype} cannot hold a move exactly: load the model in float32 (bf16=True trains it in bf16)"
            )
        elif places[parameter.data_ptr()] > 1 and parameter.numel():
            report.reason = "tied: another parameter shares its storage"
    return reports


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[str, nn.Module, bool]]:
    """For each parameter: its name, its module, and whether it is the module's main weight, which has the module's name."""
    owners: dict[nn.Parameter, tuple[str, nn.Module, bool]] = {}
    for path, module in model.named_modules():
        module_name = plain_name(path)
        for own_name, parameter in module.named_parameters(recurse=False):
            is_weight = own_name == "weight" and bool(module_name)
            name = module_name if is_weight else f"{module_name}.{own_name}".lstrip(".")
            owners.setdefault(parameter, (name, module, is_weight))
    return owners


def _role_of_other(module: nn.Module, name: str) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return role_of(name, "other")


def _why_not(parameter: nn.Parameter, parts: dict[Region, list[Use]], point: Point) -> str:
    """Why a weight must not move inside the null space of its inputs. Empty: it may."""
    others = sorted(point.trace.other_uses.get(parameter, ()))
    if parameter.dim() < 2:
        return "elementwise: it scales or shifts features and multiplies no input, so it has no null space"
    if others == ["embedding"] and not parts:
        return "embedding: rows are looked up, not multiplied; the row of an absent token is free, but its gradient is zero"
    if others and parts:
        return f"tied: also used by {', '.join(others)}, which sees other inputs"
    if not point.reaches(parameter):
        return UNUSED
    if others:
        return f"used by {', '.join(others)}, in a way that no registered projector covers"
    if not parts:
        return "used by an operation that torch functions do not show, a custom kernel for instance"
    if any(use.call.projector != calls[0].call.projector for calls in parts.values() for use in calls):
        return "used by operations with different options"
    if overlap(parameter, list(parts)):
        return TIED_VIEWS
    error = point.error(parameter, lambda gradient: weight_error(parameter, parts, gradient))
    if error <= _AGREEMENT:
        return ""
    return f"audit: the gradient of the followed uses differs from autograd's by {error:.1e}, so it has unseen uses"


def overlap(parameter: nn.Parameter, regions: list[Region]) -> bool:
    """Whether an element lies in two of the regions, or twice in one."""
    if any(size > 1 and stride == 0 for region in regions for size, stride in zip(region.shape, region.stride, strict=True)):
        return True
    if len(regions) == 1:
        return False
    count = laid_out_like(parameter, None, torch.uint8)
    for region in regions:
        region.view(count).add_(1)
    return bool((count > 1).any())


def _movable_bias(uses: list[Use], point: Point) -> nn.Parameter | None:
    """The bias that every use of the weight adds. None if it has another use, or if its gradient shows one."""
    bias = uses[0].call.bias
    if not isinstance(bias, nn.Parameter) or any(use.call.bias is not bias for use in uses):
        return None
    if not point.reaches(bias) or point.trace.other_uses.get(bias) or point.trace.uses.get(bias):
        return None
    return bias if point.error(bias, lambda gradient: bias_error(uses, gradient)) <= _AGREEMENT else None


def selected(name: str, role: str, config: TeleportConfig) -> bool:
    """Whether the settings let a layer move. They follow PEFT's conventions."""
    target, exclude = config.target_modules, config.exclude_modules
    if exclude is not None and _matches(name, exclude):
        return False
    if target == "all-linear":
        return role != "head"
    return target is None or _matches(name, target)


def _matches(name: str, pattern: list[str] | str) -> bool:
    """Whether a pattern matches a layer's name. For a PEFT adapter it may also match the name without the adapter's own name
    ('default'), or the name of the adapted layer.
    """
    names = {name, re.sub(r"(\.lora_\w+)\.\w+$", r"\1", name), re.sub(_ADAPTER, "", name)}
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, name) for name in names)
    return any(name == end or name.endswith(f".{end}") for end in pattern for name in names)


def check_targets(config: TeleportConfig, names: list[str]) -> None:
    """Make sure that each entry of `target_modules` and `exclude_modules` matches a layer.

    Raises:
        ValueError: an entry matches nothing. The message gives the nearest names.
    """
    for setting in ("target_modules", "exclude_modules"):
        value = getattr(config, setting)
        if value is None or value == "all-linear":
            continue
        for pattern in [value] if isinstance(value, str) else [[end] for end in value]:
            if any(_matches(name, pattern) for name in names):
                continue
            shown = pattern if isinstance(pattern, str) else pattern[0]
            endings = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(shown, [*endings, *names], n=3, cutoff=0.4)
            hint = f"near names: {', '.join(near)}" if near else f"names here end in: {', '.join(endings[:20])}"
            raise ValueError(f"{setting} = {value!r}: {shown!r} matches no layer of the model; {hint}.")
