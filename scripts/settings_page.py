"""docs/settings.md: every setting with its default, the methods that read it, what it does, and why it has that default.

python scripts/settings_page.py

The reasons come from the table of defaults in docs/when.md.
"""

import re
from dataclasses import fields
from pathlib import Path

from hf_teleport import TeleportConfig
from hf_teleport.settings.groups import readers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
EVIDENCE = PAGE.parent / "when.md"

_HEAD = """\
# Settings

Each setting is a field of `TeleportConfig`. Training arguments, YAML files and the command line put `teleport_` before
its name: `--teleport_epochs 5`.

A setting that `method` does not read must stay at its default. Another value is an error that names the methods that
read it. Method `auto` may choose `basis` or `null_space`, and `null_space+basis` runs both. So these two methods read
the settings of either, except `control`.

`python scripts/settings_page.py` makes this page from the help texts and [the evidence](when.md#the-defaults). A test
compares them.

| setting | default | read by method | what it does | why that default |
| --- | --- | --- | --- | --- |
"""


def reasons() -> dict[str, str]:
    """Why each setting has its default: the last cell of its row in docs/when.md."""
    table = EVIDENCE.read_text().partition("## The defaults")[2].partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            names, _, reason = line.strip("| ").split(" | ")
            found.update(dict.fromkeys(re.findall(r"`(\w+)`", names), reason.replace("](#", "](when.md#")))
    return found


def page() -> str:
    """The page, in Markdown."""
    default, why = TeleportConfig(), reasons()
    rows = []
    for setting in fields(TeleportConfig):
        methods = ", ".join(f"`{method}`" for method in readers(setting.name)) or "all"
        text = setting.metadata["help"].replace("|", r"\|")
        rows.append(f"| `{setting.name}` | `{getattr(default, setting.name)!r}` | {methods} | {text} | {why[setting.name]} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
