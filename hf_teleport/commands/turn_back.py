"""`hf-teleport turn-back`: a saved model that changes of basis have turned, in the coordinates in which its run began."""

import argparse
import shutil
from pathlib import Path

from hf_teleport.commands.parser import Subparsers, add_command

# What a model needs beside its weights and its config: tokenizers, processors, templates, the model card.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.md")
# Of training alone, or about other weights.
_OF_TRAINING = ("trainer_state.json", "teleports.json", "*.index.json")


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "turn-back",
        run,
        help="turn a saved model back into the coordinates in which its run began",
        description="Undoes the changes of basis of a run in a model that it has saved: the model of an output_dir, or of a "
        "checkpoint. What training has learned stays, and so do all outputs; then the model can be merged and averaged with what "
        "it came from. The folder itself stays as it is.",
        epilog="For instance:\n  hf-teleport turn-back runs/llama/checkpoint-500 --output llama-500",
    )
    command.add_argument("folder", type=Path, help="a folder with a model that a run with teleports has saved")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="default: turned_back in the folder")


def run(arguments: argparse.Namespace) -> None:
    """Load, turn back, save, and print what was turned."""
    from hf_teleport.inputs.models import load_model
    from hf_teleport.teleporter import Teleporter
    from hf_teleport.training.plan import TRACKED, load_way

    folder, output = arguments.folder, arguments.output or arguments.folder / "turned_back"
    if not (folder / TRACKED).exists():
        raise FileNotFoundError(
            f"{folder} has no {TRACKED}, so there is nothing to turn back: a run writes it beside weights that are turned."
        )
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output = {str(output)!r} is the folder itself, which is not allowed; give another one.")
    model = load_model(str(folder))
    teleporter = Teleporter(model)
    teleporter.tracker.way = load_way(folder, model)
    found = teleporter.turn_back()
    for symmetry in found:
        what = f"{symmetry.kind} of {symmetry.name}, {symmetry.blocks} x {symmetry.size}"
        print(f"{what}: " + (f"stays turned, for {symmetry.reason}" if symmetry.reason else "turned back"))
    model.save_pretrained(output)  # type: ignore[operator]
    for path in [path for pattern in _BESIDE for path in folder.glob(pattern)]:
        if not any(path.match(pattern) for pattern in _OF_TRAINING) and not (output / path.name).exists():
            shutil.copy(path, output / path.name)
    print(f"Written: {output}")
