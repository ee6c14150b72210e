"""docs/settings.md: every setting with its default, the methods that read it, and what it does.

python scripts/settings_page.py
"""

from dataclasses import fields
from pathlib import Path

from hf_teleport import TeleportConfig
from hf_teleport.settings.groups import readers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

_HEAD = """\
# Settings

Each is a field of `TeleportConfig`. Training arguments, YAML files and the command line put `teleport_` before its name:
`--teleport_epochs 5`.

A setting that `method` does not read must stay at its default: another value is an error that names the methods that read it.
Method `auto` may come to `basis` or `null_space`, and `null_space+basis` runs both, so these two methods read what either reads.
Neither of them takes `control`.

Made by `python scripts/settings_page.py` from the help texts; a test compares this page with them.

| setting | default | read by method | what it does |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The page, in Markdown."""
    default = TeleportConfig()
    rows = []
    for setting in fields(TeleportConfig):
        methods = ", ".join(f"`{method}`" for method in readers(setting.name)) or "all"
        text = setting.metadata["help"].replace("|", r"\|")
        rows.append(f"| `{setting.name}` | `{getattr(default, setting.name)!r}` | {methods} | {text} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
