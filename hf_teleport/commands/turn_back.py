"""`hf-teleport turn-back`: undo the changes of basis in a saved model."""

import argparse
import shutil
from pathlib import Path

from hf_teleport.commands.parser import Subparsers, add_command

# Other files that a model needs: tokenizers, processors, templates, the model card.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.md")
# Files among them that only training needs, or that describe the weights from before.
_OF_TRAINING = ("trainer_state.json", "teleports.json", "*.index.json")


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "turn-back",
        run,
        help="turn a saved model back into the coordinates in which its run began",
        description="Undoes a run's changes of basis in a model that it saved, in output_dir or in a checkpoint. The model keeps "
        "what it has learned, and all its outputs. Afterwards it can be merged or averaged with the model that the run started "
        "from. The result goes to another folder.",
        epilog="For instance:\n  hf-teleport turn-back runs/llama/checkpoint-500 --output llama-500",
    )
    command.add_argument("folder", type=Path, help="a folder with a model that a run with teleports has saved")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="for the result; default: turned_back in that folder")


def run(arguments: argparse.Namespace) -> None:
    """Load, turn back, save, and print what was turned."""
    from hf_teleport.config import TeleportConfig
    from hf_teleport.inputs.models import load_model
    from hf_teleport.teleporter import Teleporter
    from hf_teleport.training.plan import TRACKED, Plan, load_way

    folder, output = arguments.folder, arguments.output or arguments.folder / "turned_back"
    if not (folder / TRACKED).exists():
        raise FileNotFoundError(
            f"{folder} has no {TRACKED}, so there is nothing to turn back: a run writes it beside weights that are turned."
        )
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output = {str(output)!r} is the folder itself, which is not allowed; give another one.")
    model = load_model(str(folder))
    plan = Plan(TeleportConfig())
    plan.tracker.way = load_way(folder, model)
    if not plan.tracker.way:
        raise ValueError(
            f"{folder} was saved before the first change of basis, or turned back already, so there is nothing to turn back: use "
            "it as it is."
        )
    teleporter = Teleporter(model, tracker=plan.tracker)
    found = teleporter.turn_back()
    for symmetry in found:
        what = f"{symmetry.kind} of {symmetry.name}, {symmetry.blocks} x {symmetry.size}"
        print(f"{what}: " + (f"stays turned: {symmetry.reason}" if symmetry.reason else "turned back"))
    model.save_pretrained(output)  # type: ignore[operator]
    plan.save(output, model)  # the way of what stays turned
    for path in [path for pattern in _BESIDE for path in folder.glob(pattern)]:
        if not any(path.match(pattern) for pattern in _OF_TRAINING) and not (output / path.name).exists():
            shutil.copy(path, output / path.name)
    print(f"Written: {output}")
