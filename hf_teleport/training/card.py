"""What a model card says of teleportation: a section after what Trainer wrote, and tags."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_teleport.config import TeleportConfig
from hf_teleport.version import __version__

TAGS = ["hf_teleport", "teleportation"]
HEADING = "## Teleportation"

_METHODS = {
    "null_space": "`null_space` climbs to a larger gradient inside the null space of every layer's inputs, as in the paper.",
    "basis": "`basis` turns the model's exact symmetries to where its optimizer works best; no output changes, for any input.",
    "level_set": "`level_set` climbs to a larger gradient along the level set of each batch's loss, in all weights "
    "([arXiv 2403.03362](https://arxiv.org/abs/2403.03362)).",
    "symmetry": "`symmetry` climbs to a larger gradient over linear groups that act on adjacent layers "
    "([arXiv 2205.10637](https://arxiv.org/abs/2205.10637)).",
}

_CITATION = """\
```bibtex
@article{wu2025teleportation,
  title={Teleportation With Null Space Gradient Projection for Optimization Acceleration},
  author={Wu, Zihao and Dong, Juncheng and Aloui, Ahmed and Tarokh, Vahid},
  journal={arXiv preprint arXiv:2502.11362},
  year={2025}
}
```"""

_COLUMNS = ("Before step", "Method", "Loss", "Gradient norm", "Steps kept", "Weights moved", "Seconds", "Stopped because")


def section(config: TeleportConfig, events: list[dict[str, Any]]) -> str:
    """The section of a model card, in Markdown.

    Args:
        config: the settings.
        events: as `teleports` returns them; what is missing in one is left blank.
    """
    names = {event.get("method", config.method) for event in events}
    table = [_row(_COLUMNS), _row("---:" if name == "Before step" else "---" for name in _COLUMNS), *map(_event_row, events)]
    return "\n\n".join(
        [
            HEADING,
            "Before some steps of the training, the weights were moved to another place with the same loss: *teleportation* "
            f"([arXiv 2502.11362](https://arxiv.org/abs/2502.11362)), by hf_teleport {__version__}. "
            + " ".join(text for name, text in _METHODS.items() if name in names),
            "\n".join(table),
            "Losses and gradient norms are those of the batches that the teleport was made with; of one that was undone, every "
            "weight was put back. Teleportation changes the values of weights and nothing else: an ordinary Transformers model "
            "remains one, and loads without hf_teleport.",
            "To teleport with the same settings:",
            "```python\n"
            "from hf_teleport import TeleportConfig, TeleportTrainer\n\n"
            f"config = {config.as_python()}\n"
            "trainer = TeleportTrainer(model, arguments, train_dataset=rows, teleport_config=config)\n"
            "```",
            _CITATION,
        ]
    )


def add_to_card(path: Path, config: TeleportConfig, events: list[dict[str, Any]]) -> None:
    """Put the section and the tags into the model card at `path`, in place of an older section.

    Without events, or without a card (a Trainer may write none), nothing is done.
    """
    if not events or not path.exists():
        return
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    others = re.sub(rf"^{HEADING}\b.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)
    card.text = f"{others.rstrip()}\n\n{section(config, events)}\n"
    card.save(path)


def _event_row(event: dict[str, Any]) -> str:
    return _row(
        (
            _number(event.get("step")),
            event.get("method", ""),
            f"{_number(event.get('loss_before'), '.6g')} → {_number(event.get('loss_after'), '.6g')}",
            f"{_number(event.get('grad_norm_before'), '.4g')} → {_number(event.get('grad_norm_after'), '.4g')}",
            _number(event.get("steps")),
            _number(event.get("moved_share"), ".0%"),
            _number(event.get("seconds"), ".2f"),
            f"{event.get('stopped_because', '')}{', undone' if event.get('rolled_back') else ''}",
        )
    )


def _number(value: Any, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
