"""The section on teleportation, and the tags, that are added to Trainer's model card."""

import re
from collections.abc import Iterable
from inspect import getdoc
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_teleport.config import TeleportConfig
from hf_teleport.display.events import TEXTS, cells, columns
from hf_teleport.methods import METHODS, Method
from hf_teleport.version import __version__

TAGS = ["hf_teleport", "teleportation"]
HEADING = "## Teleportation"

_CITATION = """\
```bibtex
@article{wu2025teleportation,
  title={Teleportation With Null Space Gradient Projection for Optimization Acceleration},
  author={Wu, Zihao and Dong, Juncheng and Aloui, Ahmed and Tarokh, Vahid},
  journal={arXiv preprint arXiv:2502.11362},
  year={2025}
}
```"""


def section(config: TeleportConfig, events: list[dict[str, Any]]) -> str:
    """The section of a model card, in Markdown.

    Args:
        config: the settings.
        events: the result of `teleports`. A value that is missing in an event is left blank.
    """
    names = dict.fromkeys(event.get("method", config.method) for event in events)
    shown = columns(events)
    rules = ("---" if name in TEXTS else "---:" for name in shown)
    table = [_row(name.capitalize() for name in shown), _row(rules), *(_row(cells(event, shown)) for event in events)]
    return "\n\n".join(
        [
            HEADING,
            "Before some steps of the training, the weights were moved to another place with the same loss: *teleportation* "
            f"([arXiv 2502.11362](https://arxiv.org/abs/2502.11362)), by hf_teleport {__version__}. "
            + " ".join(f"`{name}`: {_first_paragraph(METHODS[name])}" for name in names if name in METHODS),
            "\n".join(table),
            "Losses and gradient norms were measured on the batches of the teleport. If a teleport was undone, every weight was "
            "put back. Teleportation changes the values of weights and nothing else: this is an ordinary Transformers model, "
            "and loads without hf_teleport.",
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
    """Put the section and the tags into the model card at `path`. An older section is replaced.

    Does nothing without events, or if Trainer wrote no card.
    """
    if not events or not path.exists():
        return
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    others = re.sub(rf"^{HEADING}\b.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)
    card.text = f"{others.rstrip()}\n\n{section(config, events)}\n"
    card.save(path)


def _first_paragraph(method: type[Method]) -> str:
    return (getdoc(method) or "").partition("\n\n")[0].replace("\n", " ")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
