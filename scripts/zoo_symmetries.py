"""Turn the symmetries of tiny versions of the architectures of Transformers by random rotations, and write down how exact it was.

    python scripts/zoo_symmetries.py --output docs/zoo_symmetries.md      # all of them, two minutes on one core
    python scripts/zoo_symmetries.py llama gpt2 vit                       # some, to the screen

Each twice in float64: as it comes from its config, with uniform gains; and with every norm's gain and every bias perturbed, as
training would. Rerun it for a new release of Transformers.
"""

import argparse
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from zoo_models import FAMILIES, NAMES, build, loss_fn

from hf_teleport.layers.double import KeepDouble
from hf_teleport.layers.point import evaluate
from hf_teleport.methods.basis.bases import Random, balance
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.turn import Turn
from hf_teleport.weights.isolation import evaluation_mode
from hf_teleport.weights.norms import norm

HEADER = """# The symmetries of the zoo

Tiny architectures of Transformers, built from configs with random weights. All symmetries that were found are turned at once by
random rotations, in float64 and without the models' own casts to float32; in float32 where a model does not run so. Made by
`python scripts/zoo_symmetries.py --output docs/zoo_symmetries.md` with transformers {version}.

{count} architectures, {failed} failed; {turned} have a symmetry to turn, {streams} a residual stream when gains are uneven,
{fresh} when they are uniform, as at initialisation. In float64 the largest relative change of the loss is {loss:.0e}, and the
largest relative difference between the gradient after and the turned gradient before {gradient:.0e}.

- *turned*: blocks of each kind that turn when all gains and biases are uneven; `+ stream` where the residual stream turns only
  while gains are uniform.
- *loss*, *gradient*: the two differences, with uneven gains.
- *left out*: the reasons for the widest symmetries that do not turn.

| family | architecture | turned | loss | gradient | left out |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Row:
    """What one architecture's turn came to."""

    name: str
    turned: Counter[str]
    loss: float
    gradient: float
    left_out: list[str]
    exact: bool  # in float64


def measure(name: str, *, uneven: bool, dtype: torch.dtype = torch.float64) -> Row:
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
        random = Random(used, seed=0)
        turn = Turn({s: balance(s) if s.kind == "scaling" else random.choose(s) for s in used})
        pairs = zip(before.parameters, before.gradients, strict=True)
        expected = turn.gradients({p: g for p, g in pairs if g is not None})
        turn.carry_out()
        after = evaluate(model, loss_fn, batch, seed=0)
    found = dict(zip(after.parameters, after.gradients, strict=True))
    differences = [g - (0 if found[p] is None else found[p]) for p, g in expected.items()]
    turned: Counter[str] = Counter()
    for symmetry in used:
        turned[symmetry.kind] += symmetry.blocks if symmetry.kind != "scaling" else 1
    widest = sorted((s for s in symmetries if s.reason and s.kind != "chain"), key=lambda s: -s.size)
    return Row(
        name,
        turned,
        abs(after.loss / before.loss - 1),
        norm(differences) / before.grad_norm,
        list(dict.fromkeys(s.reason for s in widest))[:2],
        dtype == torch.float64,
    )


def page(rows: list[tuple[Row, Row]], failed: dict[str, str]) -> str:
    """The matrix as Markdown; each row is that with uneven gains, and that with uniform ones."""
    both = [row for pair in rows for row in pair]
    lines = HEADER.format(
        version=transformers.__version__,
        count=len(rows),
        failed=len(failed),
        turned=sum(bool(uneven.turned) for uneven, _ in rows),
        streams=sum("stream" in uneven.turned for uneven, _ in rows),
        fresh=sum("stream" in uniform.turned for _, uniform in rows),
        loss=max(row.loss for row in both if row.exact),
        gradient=max(row.gradient for row in both if row.exact),
    ).splitlines()
    family_of = {name: family for family, names in FAMILIES.items() for name in names}
    for uneven, uniform in rows:
        turned = ", ".join(f"{count} {kind}" for kind, count in sorted(uneven.turned.items()))
        if uniform.turned["stream"] > uneven.turned["stream"]:
            turned += " + stream"
        cells = [family_of[uneven.name], uneven.name, turned, f"{uneven.loss:.0e}", f"{uneven.gradient:.0e}"]
        lines.append("| " + " | ".join([*cells, "; ".join(uneven.left_out)]) + " |")
    lines += [f"\n- {name} failed: {reason}" for name, reason in failed.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="architectures; default: all")
    parser.add_argument("--output", type=Path, help="write the matrix to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows, failed = [], {}
    for name in tqdm(args.names, unit="model"):
        try:
            try:
                rows.append((measure(name, uneven=True), measure(name, uneven=False)))
            except RuntimeError:  # parts of it run in float32 only
                rows.append(tuple(measure(name, uneven=uneven, dtype=torch.float32) for uneven in (True, False)))
        except Exception as error:  # the matrix is to say which architecture fails, and go on
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    text = page(rows, failed)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
