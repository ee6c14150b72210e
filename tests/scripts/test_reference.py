"""The reference: it builds without a warning, it has every page, and everything in it is explained."""

import importlib
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_teleport import TeleportConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import reference  # noqa: E402


def test_it_builds_without_warnings(tmp_path):
    reference.build(tmp_path)
    for name in reference.PUBLIC:
        page = tmp_path / (name.replace(".", "/") + ".html")
        assert page.stat().st_size > 1000, name
    page = (tmp_path / "hf_teleport" / "config.html").read_text()
    assert all(setting.name in page for setting in fields(TeleportConfig))


def members(owner, module):
    """What an object defines itself, and shows."""
    names = getattr(owner, "__all__", None) or [name for name in vars(owner) if not name.startswith("_")]
    for name in names:
        thing = inspect.unwrap(getattr(owner, name))
        thing = thing.fget if isinstance(thing, property) else thing
        if (inspect.isclass(thing) or inspect.isroutine(thing)) and getattr(thing, "__module__", "").startswith(module):
            yield name, thing


@pytest.mark.parametrize("module", reference.PUBLIC)
def test_every_public_name_has_a_docstring(module):
    page = importlib.import_module(module)
    assert page.__doc__
    for name, thing in members(page, "hf_teleport"):
        assert inspect.getdoc(thing), f"{module}.{name}"
        if inspect.isclass(thing):
            for inner, _ in members(thing, "hf_teleport"):
                assert inspect.getdoc(getattr(thing, inner)), f"{module}.{name}.{inner}"


def test_help_explains_every_setting():
    for setting in fields(TeleportConfig):
        assert f"{setting.name}: {setting.metadata['help']}" in inspect.getdoc(TeleportConfig)


def test_pages_import_from_public_modules_only():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            imported = re.findall(r"^\s*(?:from|import) (hf_teleport[\w.]*)", block, flags=re.MULTILINE)
            assert set(imported) <= set(reference.PUBLIC), page.name
