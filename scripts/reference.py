"""The reference: a page for each public module, from its docstrings. `make docs` writes it to build/docs."""

import sys
import warnings
from pathlib import Path

import pdoc

from hf_teleport import __version__

# What semantic versioning speaks of (docs/versions.md); everything else may change in any release.
PUBLIC = (
    "hf_teleport",
    "hf_teleport.config",
    "hf_teleport.html",
    "hf_teleport.inspection",
    "hf_teleport.journal",
    "hf_teleport.metrics",
    "hf_teleport.projectors",
    "hf_teleport.report",
    "hf_teleport.tasks",
)


def build(folder: Path) -> None:
    """Write the pages, `index.html` first.

    Raises:
        UserWarning, RuntimeWarning: pdoc cannot tell where something comes from, or a module does not import.
    """
    pdoc.render.configure(docformat="google", footer_text=f"hf_teleport {__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        # These fields are made of those of TeleportConfig, so no source has them.
        warnings.filterwarnings("ignore", r"Cannot determine where hf_teleport\.[\w.]+\.teleport_\w+ is", module="pdoc")
        pdoc.pdoc(*PUBLIC, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
