"""The pages of the documentation, and what stands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def blocks(page, kind):
    """The texts of all blocks of a kind ('python', 'bash', 'yaml', 'text'), also of those in a list."""
    return [body for language, body in _fences(page.read_text()) if language == kind]


def shown(page):
    """Each Python block, with the text block right beneath it: what it prints; None if there is none."""
    text = page.read_text()
    found = list(_FENCE.finditer(text))
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block[2] == "python":
            beneath = following and following[2] == "text" and not text[block.end() : following.start()].strip()
            yield block[3], following[3] if beneath else None


def prose(page):
    """A page without its code."""
    return _CODE.sub("", page.read_text())


def anchors(page):
    """What a link to a heading of this page may have after its #, as GitHub makes it."""
    text = _FENCE.sub("", page.read_text())
    slugs = []
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        slugs.append(slug if slug not in slugs else f"{slug}-{slugs.count(slug)}")
    return slugs


def _fences(text):
    for indent, language, body in _FENCE.findall(text):
        yield language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)


def rows_of(text):
    """The cells of each row of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
