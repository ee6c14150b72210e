"""Try every optimizer of the packages that people train with: does its state follow a change of basis, or is it refused?

    python scripts/optimizers.py                     # all of them, and write docs/optimizers.md's tables
    python scripts/optimizers.py --only bitsandbytes # those of one package
    python scripts/optimizers.py --only Trainer --names lomo rmsprop

A small Llama is trained for some steps. Then its features are permuted and their signs changed: a change of basis under which an
optimizer that looks at each coordinate alone must do the very same, second moments included. The cosine is that of its next
update with the turned next update of the model that was left as it was. The optimizers of Trainer's `optim` also train with
TeleportTrainer.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from optimizer_catalogue import PACKAGES, RATE, Make, by_name, made
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.symmetry import Symmetry
from hf_teleport.methods.basis.turn import Turn, turn_axis
from hf_teleport.optimizers.parts import groups_of, states
from hf_teleport.optimizers.rehearsal import RehearsalError
from hf_teleport.optimizers.rules import Judgement, judge
from hf_teleport.optimizers.state import OptimizerState, check_optimizer
from hf_teleport.weights.snapshot import Snapshot

PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"
START, END = "<!-- table: scripts/optimizers.py -->", "<!-- end of table -->"
STEPS = 5
# Those whose averages are kept in codes agree as far as the codes are fine.
QUANTISED = 0.95
EXACT = 0.99


def llama(width: int = 64) -> nn.Module:
    """A Llama of 2 layers. Of width 64 some weights have more than 4096 elements, and their states are quantised; of 32 none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160 if width > 32 else 96, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, 96, (4, 16), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def signed(symmetry: Symmetry) -> Tensor:
    """A permutation of the features of each block with some signs changed, (H, k, k)."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(symmetry.blocks):
        sign = torch.randint(0, 2, (symmetry.size,), generator=generator) * 2.0 - 1
        found.append(torch.eye(symmetry.size)[torch.randperm(symmetry.size, generator=generator)] * sign)
    return torch.stack(found).double()


def step(model: nn.Module, optimizer: Any, ids: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, ids).backward()
    optimizer.step()


def next_update(model: nn.Module, optimizer: Any, ids: Tensor, watched: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    before = {parameter: parameter.detach().clone() for parameter in watched}
    step(model, optimizer, ids)
    return {parameter: parameter.detach() - before[parameter] for parameter in watched}


def agreement(model: nn.Module, optimizer: Any) -> tuple[float, dict[nn.Parameter, Judgement]]:
    """The cosine of the next update after a permutation with the permuted one, over all weights that it turns.

    Raises:
        ValueError: the optimizer is refused.
    """
    check_optimizer(optimizer)
    stream = batches()
    with torch.compiler.set_stance("force_eager"):
        for _ in range(STEPS):
            step(model, optimizer, next(stream))
        # A gain that is not one is folded, which scales gradients; this is about turns.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(1.0)
        ids = next(stream)
        symmetries = [s for s in find_symmetries(model, loss_of, ids)[0] if not s.reason and s.kind != "scaling"]
        turn = Turn({symmetry: signed(symmetry) for symmetry in symmetries})
        turned = list(dict.fromkeys(part.parameter for symmetry in symmetries for part in symmetry.parts))
        options = [(group, copy.copy(group)) for _, group in groups_of(optimizer).values()]
        kept = Snapshot(model.parameters(), states(optimizer))
        plain = next_update(model, optimizer, ids, turned)
        kept.restore()
        for group, before in options:
            group.update(before)
        turn.carry_out(OptimizerState(optimizer))
        found = next_update(model, optimizer, ids, turned)
    for symmetry, matrices in turn.rotations.items():
        for part in symmetry.parts:
            turn_axis(plain[part.parameter], part, matrices)
    return float(nn.functional.cosine_similarity(flat(found, turned), flat(plain, turned), 0)), judge(optimizer)


def flat(tensors: dict[nn.Parameter, Tensor], order: list[nn.Parameter]) -> Tensor:
    return torch.cat([tensors[parameter].flatten().double() for parameter in order])


def kinds(judged: dict[nn.Parameter, Judgement]) -> str:
    """What is kept for the weights, in words."""
    found: dict[str, set[str]] = {}
    for judgement in judged.values():
        for path, rule in judgement.rules.items():
            axes = list(rule.axes.values())
            if rule.square:
                kind = "squares" if all(axes) else "factored squares"
            elif not any(axes):
                kind = "in its own basis"
            elif any(len(own) > 1 for own in axes):
                kind = "preconditioner"
            else:
                kind = "turns" if all(axes) else "projected"
            found.setdefault(kind, set()).add(path)
    return "; ".join(f"{kind}: {', '.join(sorted(paths))}" for kind, paths in sorted(found.items())) or "nothing"


def row(package: str, name: str, make: Make) -> dict[str, Any]:
    """One line of the table."""
    line: dict[str, Any] = {"package": package, "optimizer": name, "basis": "", "auto": "", "keeps": "", "cosines": []}
    try:
        model = llama()
        optimizer = make(model)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        with torch.compiler.set_stance("force_eager"):
            step(model, optimizer, next(batches()))
    except Exception as error:  # what a package can't do here is no finding of ours
        return {**line, "basis": _not_run(error)}
    model, small = llama(), llama(32)
    small_ones = make(small)
    try:
        line["auto"] = Teleporter(small, TeleportConfig(), optimizer=small_ones).choose(next(batches()), loss_of)[0].method
    except RehearsalError:
        line["auto"] = "none"
    try:
        cosine, judged = agreement(model, make(model))
        return {**line, "basis": "turned", "keeps": kinds(judged), "cosines": [agreement(small, small_ones)[0], cosine]}
    except ValueError as error:
        return {**line, "basis": f"refused: {brief(error)}"}


def _not_run(error: Exception) -> str:
    missing = isinstance(error, ImportError) or "install" in str(error) or "import" in str(error)
    return f"{'not installed' if missing else 'did not run here'}: {brief(error)}"


def trained(name: str, method: str) -> str:
    """What became of the events of a run with `TeleportTrainer` and an optimizer of Trainer's."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat([next(batches()) for _ in range(4)])]
    settings: dict[str, Any] = {"optim_target_modules": ["self_attn", "mlp"]} if "galore" in name or "apollo" in name else {}
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, optim=name, max_steps=4, per_device_train_batch_size=4, learning_rate=RATE, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", optim_args="rank=8" if settings else None, **settings,
        )  # fmt: skip
        config = TeleportConfig(method="basis", steps=[2]) if method == "basis" else TeleportConfig(budget=None)
        trainer = TeleportTrainer(llama(), args, train_dataset=rows, teleport_config=config)
        try:
            with torch.compiler.set_stance("force_eager"):
                trainer.train()
        except ValueError as error:
            if trainer.state.global_step:
                raise
            return f"refused: {brief(error)}"
        reports = trainer.teleport_reports
    return ", ".join(f"{r.method}: {r.stopped_because.replace('_', ' ')}" for r in reports) or "no teleports"


def row_of_trainer(name: str) -> dict[str, Any]:
    """A line for one of Trainer's `optim`: it trains without us, and then with teleports."""
    line = row("Trainer", f"optim={name!r}", by_name(name))
    if not line["basis"].startswith(("not installed", "did not run")):
        for method in ("basis", "auto"):
            try:
                line[method] = trained(name, method)
            except Exception as error:  # shown in the table, and as a failure
                line[method] = f"ENDED: {brief(error)}"
    return line


def least(name: str) -> float:
    """The cosine that must be reached."""
    return QUANTISED if any(codes in name.lower() for codes in ("4bit", "8bit", "fp8")) else EXACT


def brief(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.split(". Set teleport")[0].split(". Use an")[0].replace("|", "/")


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for line in rows:
        cosines = " | ".join(f"{cosine:.4f}" for cosine in line["cosines"]) or " | "
        cells = (line[name] for name in ("package", "optimizer", "basis", "auto", "keeps"))
        lines.append(f"| {' | '.join(cells)} | {cosines} |")
    return lines


HEAD = [
    "| package | optimizer | basis | auto | what it keeps | cosine, width 32 | width 64 |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows in the page's table, in the place of those of the same optimizers."""
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    lines = {_named(line): line for line in page.split(START)[1].split(END)[0].strip().splitlines()[2:]}
    lines |= {_named(line): line for line in table(rows)}
    ordered = sorted(lines.values(), key=lambda line: PACKAGES.index(_named(line)[0]))
    PAGE.write_text("\n".join([before + START, *HEAD, *ordered, END + after]))


def _named(line: str) -> tuple[str, ...]:
    """Package and optimizer of a line of the table."""
    return tuple(line.removeprefix("| ").split(" | ")[:2])


def chosen(packages: list[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each optimizer that is asked for, and what makes its row."""
    if "Trainer" in packages:
        for each in OptimizerNames:
            yield each.value, partial(row_of_trainer, each.value)
    if packages != ["Trainer"]:
        for (package, name), make in made().items():
            if package in packages:
                yield name, partial(row, package, name, make)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PACKAGES, help="one package")
    parser.add_argument("--names", nargs="+", help="some of its optimizers")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = []
    for name, run in chosen([asked.only] if asked.only else PACKAGES):
        if asked.names is None or name in asked.names:
            line = run()
            print(line, flush=True)
            write([line])
            if any(not cosine > least(name) for cosine in line["cosines"]) or "ENDED" in line["basis"] + line["auto"]:
                wrong.append(line)
    for line in wrong:
        print("WRONG", line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
