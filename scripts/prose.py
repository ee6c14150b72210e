"""Find lines of more than 120 characters and sentences of more than 30 words in the documentation.

    python scripts/prose.py                     # all pages; exit code 1 if anything is found
    python scripts/prose.py docs/basis.md       # some pages

Code blocks are not looked at. A table row and a line with a URL may be long. Inline code and a link's address count as one word.
In a table a semicolon ends a sentence, because cells are lists.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MAX_LINE, MAX_WORDS = 120, 30

_NO_PROSE = re.compile(r"^( *)```.*?^\1```|<!--.*?-->|(?<=\n\n)(?:    [^\n]*\n)+", re.DOTALL | re.MULTILINE)
_BLOCK_START = re.compile(r"\s*([-*+]|\d+\.|#+|>|\|)(\s|$)")
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')*_\]]*\s+(?=["'(*_\[]*[A-Z0-9]|')""")


def problems(text: str) -> Iterator[tuple[int, str]]:
    """The line number and the description of each problem in a Markdown text."""
    text = _NO_PROSE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > MAX_LINE and not line.lstrip().startswith("|") and "://" not in line:
            yield number, f"a line of {len(line)} characters; at most {MAX_LINE} are allowed"
    for number, block in _blocks(text):
        for sentence in _SENTENCE_END.split(block):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > MAX_WORDS:
                start = " ".join(words[:8])
                yield number, f"a sentence of {len(words)} words; at most {MAX_WORDS} are allowed: {start} ..."


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, list items, headings and table cells as plain text, each with its first line's number."""
    block: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if not line.strip() or _BLOCK_START.match(line):
            yield start, _plain(" ".join(block))
            block, start = [], number if line.strip() else number + 1
        if line.lstrip().startswith("|"):
            yield from ((number, part) for cell in _plain(line).split("|") for part in cell.split("; "))
        else:
            block.append(line)


def _plain(markdown: str) -> str:
    without_code = re.sub(r"`[^`]*`", "Code", markdown)
    return re.sub(r"\]\([^)]*\)", "]", without_code)


def main(names: list[str]) -> int:
    found = 0
    for page in [Path(name).resolve() for name in names] or PAGES:
        for number, problem in sorted(problems(page.read_text(encoding="utf-8"))):
            print(f"{os.path.relpath(page)}:{number}: {problem}")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
