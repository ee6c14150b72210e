"""The zoo's report on symmetries: all that an architecture has are turned by random rotations, and how exact that was.

Each architecture twice in float64: as it comes from its config, with uniform gains; and with every norm's gain and every bias
perturbed, as training would. A second turn follows, and the way home from both. Then a third turn, a random step of all weights
in place of training, and the way home from there.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from hf_teleport.layers.double import KeepDouble
from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.bases import Random, balance
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.symmetry import Symmetry
from hf_teleport.methods.basis.turn import Turn
from hf_teleport.methods.basis.way import Way
from hf_teleport.weights.isolation import evaluation_mode
from hf_teleport.weights.norms import norm

from architectures import build, loss_fn

HEADER = """# The symmetries of the zoo

Tiny architectures of Transformers, built from configs with random weights. Random rotations turn all symmetries that
were found at once. They run in float64 and without the models' own casts to float32, or in float32 if a model does not
run so. Made by `python scripts/zoo/report.py symmetries --output docs/zoo_symmetries.md` with transformers {version}.

{count} architectures, {failed} failed. {turned} have a symmetry to turn. A residual stream turns in {streams} when
gains are uneven, and in {fresh} when they are uniform, as at initialisation. In float64 the largest relative change of
the loss is {loss:.0e}, and the largest relative difference between the gradient after and the turned gradient before
{gradient:.0e}. After a second random turn and the way home, no weight is further from where it was than {home:.0e}.
After a turn and a step of all weights, the way home changes the loss by at most {trained:.0e}.

- *turned*: blocks of each kind that turn when all gains and biases are uneven. `+ stream` means that the residual
  stream turns only while gains are uniform.
- *loss*, *gradient*: the two differences, with uneven gains.
- *home*: how far a weight is from where it was, at most, once two turns are undone by the composed way. The unit is the
  largest weight of its parameter, or 1 if that is less.
- *trained*: the relative change of the loss on the way home, after a turn and a random step of all weights. What the
  step keeps from coming home stays turned, such as a stream whose gains can't be folded.
- *left out*: the reasons for the widest symmetries that do not turn.

| family | architecture | turned | loss | gradient | home | trained | left out |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Turned:
    """What one turn of an architecture came to."""

    turned: dict[str, int]  # blocks of each kind
    loss: float
    gradient: float
    home: float
    trained: float
    left_out: list[str]
    exact: bool  # in float64


@dataclass
class Row:
    """What an architecture's two turns came to."""

    name: str
    uneven: Turned
    uniform: Turned


def turn_all(name: str, dtype: torch.dtype, *, uneven: bool) -> Turned:
    """Turn all that can be turned; in float64 without the model's casts to float32."""
    model, batch = build(name, dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if uneven and parameter.dim() == 1:
            parameter.data += 0.3 * torch.rand_like(parameter)
    with evaluation_mode(model), KeepDouble() if dtype == torch.float64 else nullcontext():
        symmetries, _ = find_symmetries(model, loss_fn, batch)
        used = [symmetry for symmetry in symmetries if not symmetry.reason]
        before = evaluate(model, loss_fn, batch, seed=0)
        first = [parameter.detach().clone() for parameter in model.parameters()]
        way, turn = Way(), _random_turn(used, seed=0)
        pairs = zip(before.parameters, before.gradients, strict=True)
        expected = turn.gradients({p: g for p, g in pairs if g is not None})
        turn.carry_out()
        way.add(turn)
        after = evaluate(model, loss_fn, batch, seed=0)
    again = _random_turn(used, seed=1)
    again.carry_out()
    way.add(again)
    way.turn_back()
    off = [
        float((now.detach() - then).abs().max() / then.abs().max().clamp_min(1))
        for now, then in zip(model.parameters(), first, strict=True)
        if then.numel()
    ]
    with evaluation_mode(model), KeepDouble() if dtype == torch.float64 else nullcontext():
        trained = _home_after_a_step(model, batch, used)
    found = dict(zip(after.parameters, after.gradients, strict=True))
    differences = [g - (0 if found[p] is None else found[p]) for p, g in expected.items()]
    turned: Counter[str] = Counter()
    for symmetry in used:
        turned[symmetry.kind] += symmetry.blocks if symmetry.kind != "scaling" else 1
    widest = sorted((s for s in symmetries if s.reason and s.kind != "chain"), key=lambda s: -s.size)
    return Turned(
        dict(turned),
        abs(after.loss / before.loss - 1),
        norm(differences) / before.grad_norm,
        max(off),
        trained,
        list(dict.fromkeys(s.reason for s in widest))[:2],
        dtype == torch.float64,
    )


def _home_after_a_step(model: nn.Module, batch: Any, used: list[Symmetry]) -> float:
    """The relative change of the loss on the way home."""
    way, turn = Way(), _random_turn(used, seed=2)
    turn.carry_out()
    way.add(turn)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    losses = [evaluate(model, loss_fn, batch, seed=0).loss]
    way.turn_back(way.staying({parameter: name for name, parameter in model.named_parameters()}))
    losses.append(evaluate(model, loss_fn, batch, seed=0).loss)
    return abs(losses[1] / losses[0] - 1)


def _random_turn(used: list[Symmetry], seed: int) -> Turn:
    random = Random(used, seed)
    return Turn({s: balance(s) if s.kind == "scaling" else random.choose(s) for s in used})


def measure(name: str) -> Row:
    """Everything about one architecture."""
    try:
        return Row(name, *(turn_all(name, torch.float64, uneven=uneven) for uneven in (True, False)))
    except RuntimeError:  # parts of it run in float32 only
        return Row(name, *(turn_all(name, torch.float32, uneven=uneven) for uneven in (True, False)))


def header(rows: list[Row], failed: int) -> str:
    """What the page says above its rows."""
    exact = [turned for row in rows for turned in (row.uneven, row.uniform) if turned.exact]
    return HEADER.format(
        version=transformers.__version__,
        count=len(rows),
        failed=failed,
        turned=sum(bool(row.uneven.turned) for row in rows),
        streams=sum("stream" in row.uneven.turned for row in rows),
        fresh=sum("stream" in row.uniform.turned for row in rows),
        loss=max((turned.loss for turned in exact), default=0.0),
        gradient=max((turned.gradient for turned in exact), default=0.0),
        home=max((turned.home for turned in exact), default=0.0),
        trained=max((turned.trained for turned in exact), default=0.0),
    )


def cells(row: Row) -> list[str]:
    """One row of the page, after the architecture's name."""
    uneven = row.uneven
    turned = ", ".join(f"{count} {kind}" for kind, count in sorted(uneven.turned.items()))
    if row.uniform.turned.get("stream", 0) > uneven.turned.get("stream", 0):
        turned += " + stream"
    numbers = [f"{number:.0e}" for number in (uneven.loss, uneven.gradient, uneven.home, uneven.trained)]
    return [turned, *numbers, "; ".join(uneven.left_out)]
