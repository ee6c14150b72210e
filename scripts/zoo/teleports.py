"""The zoo's report on teleports: one null-space event on each architecture, with random weights, at tau = 1 and on one batch."""

import platform
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm import tqdm

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.audit import audit
from hf_teleport.layers.point import evaluate
from hf_teleport.layers.subspace import Representation, null_space
from hf_teleport.methods.null_space.direction import exact_direction, fast_direction
from hf_teleport.report import LayerReport, share
from hf_teleport.weights.isolation import evaluation_mode

from architectures import build, loss_fn

# Short names for the reasons, by how they begin.
REASONS = ["elementwise", "embedding", "tied", "frozen", "the loss does not depend", "used by", "audit", "not selected"]

HEADER = """# The zoo

Tiny architectures of Transformers, built from configs with random weights, each teleported once on one batch at
tau = 1. Made by `python scripts/zoo/report.py teleports --output docs/zoo.md`; rerun it to check a new release of
Transformers.

{versions}. {count} architectures ran, {failed} did not. Largest relative loss change
{change:.0e} in float32, {change_64:.0e} in float64. In {nine_tenths} of {count}, at least nine tenths of the matrix
elements may move.

- *may move*, *moved*: share of the elements of trainable weights with two or more dimensions. Embeddings, learned
  positions and tokens, and tied weights do not count. There are three reasons why a
  weight may move but did not. It has no null space at these sizes, or nothing trainable below it, or its direction is
  rounding beside a far more sensitive layer's.
- *loss*: relative change of the loss on the batch. Many architectures compute their loss in float32 whatever the
  weights are.
- *growth*: of the gradient norm. An event ends when it has doubled, or after 8 steps.
- *fast = exact*: relative difference between the direction without double backward and the one with it, in float64. It
  is empty where double backward or float64 does not run. It is large where a model detaches part of its forward
  (rt_detr, deformable_detr), which a difference of two forwards follows and double backward does not. It is also large
  where activations vanish or explode through tens of layers, as in deep networks with batch norm at initialisation
  (mobilenet, efficientnet). No single shift suits all their layers.
- *stay*: weights that may not move, by reason. The report of a teleport says it for each.

| family | architecture | may move | moved | loss, float32 | loss, float64 | growth | fast = exact | stay |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Row:
    """What one architecture's teleport came to."""

    name: str
    movable: float  # share of the elements of matrix-like weights, embeddings and tied ones aside, that may move
    moved: float  # the same of those that did
    loss_change: float  # relative, float32
    loss_change_64: float | None  # relative, float64; None: the architecture does not run in float64
    growth: float  # of the gradient norm
    agreement: float | None  # relative difference of the fast and the exact direction, float64
    skipped: dict[str, int]  # weights that may not move, by reason
    stopped: str
    seconds: float


def matrix_like(layer: LayerReport) -> bool:
    """Whether a weight is one that one expects to move."""
    added = re.search("embed|position|token|quer", layer.name.rsplit(".", 1)[-1]) and layer.role == "other"
    aside = layer.role == "embedding" or added or layer.reason.startswith(("tied", "elementwise", "embedding", "frozen"))
    return len(layer.shape) >= 2 and not aside


def shorten(reason: str) -> str:
    return next((short for short in REASONS if reason.startswith(short)), reason)


def teleport(name: str, dtype: torch.dtype) -> Any:
    """One event at tau = 1 and its report."""
    model, batch = build(name, dtype)
    return Teleporter(model, TeleportConfig(learning_rate=0.01, max_loss_change=None)).teleport([batch], loss_fn)


def agreement(name: str) -> float | None:
    """Relative difference between the fast direction and that by double backward, all layers together."""
    model, batch = build(name, torch.float64)
    difference = length = 0.0
    with evaluation_mode(model):
        point = evaluate(model, loss_fn, batch, seed=0, differentiable_gradients=True)
        layers, _ = audit(model, point, TeleportConfig())
        direction = [None if g is None else g.detach() for g in point.gradients]
        fast = fast_direction(model, loss_fn, point, direction, layers)
        exact = exact_direction(point, direction, layers)
        for layer in layers:
            representation = Representation()
            layer.represent(point.trace.uses[layer.weight][layer.region], representation)
            subspace = null_space(representation, 1.0)
            if layer in exact and layer in fast:
                a, b = subspace.project(fast[layer]), subspace.project(exact[layer])
                difference += float((a - b).square().sum())
                length += float(b.square().sum())
    return (difference / length) ** 0.5 if length else None


def measure(name: str) -> Row:
    """Everything about one architecture."""
    start = time.perf_counter()
    report = teleport(name, torch.float32)
    seconds = time.perf_counter() - start
    change_64 = worst = None
    try:
        double = teleport(name, torch.float64)
        change_64 = abs(double.loss_after / double.loss_before - 1)
        worst = agreement(name)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # no float64, or no second derivative
        tqdm.write(f"{name}: {str(error).splitlines()[0][:120]}")
    matrices = [layer for layer in report.layers if matrix_like(layer)]
    return Row(
        name,
        share(matrices, lambda layer: layer.movable),
        share(matrices, lambda layer: layer.moved),
        abs(report.loss_after / report.loss_before - 1),
        change_64,
        report.grad_norm_after / report.grad_norm_before,
        worst,
        dict(Counter(shorten(layer.reason) for layer in report.layers if not layer.movable)),
        report.stopped_because,
        seconds,
    )


def header(rows: list[Row], failed: int) -> str:
    """What the page says above its rows."""
    return HEADER.format(
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        count=len(rows),
        failed=failed,
        change=max((row.loss_change for row in rows), default=0.0),
        change_64=max((row.loss_change_64 or 0.0 for row in rows), default=0.0),
        nine_tenths=sum(row.movable >= 0.9 for row in rows),
    )


def cells(row: Row) -> list[str]:
    """One row of the page, after the architecture's name."""
    return [
        f"{row.movable:.1%}",
        f"{row.moved:.1%}",
        f"{row.loss_change:.0e}",
        "" if row.loss_change_64 is None else f"{row.loss_change_64:.0e}",
        f"{row.growth:.2f}",
        "" if row.agreement is None else f"{row.agreement:.0e}",
        ", ".join(f"{count} {reason}" for reason, count in sorted(row.skipped.items())),
    ]
