"""Find sentences of more than 30 words in pages, docstrings and comments, and lines of more than 120 characters in pages.

    python scripts/prose.py                     # all pages and the package; exit code 1 if anything is found
    python scripts/prose.py docs/basis.md       # some files

Code blocks are not looked at. A table row and a line with a URL may be long. Inline code and a link's address count as one word.
In a table a semicolon ends a sentence, because cells are lists. The length of Python lines is ruff's to check.
"""

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = sorted((ROOT / "hf_teleport").rglob("*.py"))
MAX_LINE, MAX_WORDS = 120, 30

_NO_PROSE = re.compile(r"^( *)```.*?^\1```|<!--.*?-->|(?<=\n\n)(?:    [^\n]*\n)+", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"(?:^ *#[^\n]*\n)+", re.MULTILINE)
_BLOCK_START = re.compile(r"\s*([-*+]|\d+\.|#+|>|\|)(\s|$)")
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')*_\]]*\s+(?=["'(*_\[]*[A-Z0-9]|')""")


def problems(text: str) -> Iterator[tuple[int, str]]:
    """The line number and the description of each problem in a Markdown text."""
    text = _NO_PROSE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > MAX_LINE and not line.lstrip().startswith("|") and "://" not in line:
            yield number, f"a line of {len(line)} characters; at most {MAX_LINE} are allowed"
    yield from long_sentences(text)


def long_sentences(text: str) -> Iterator[tuple[int, str]]:
    """The line number and the description of each sentence that is too long."""
    for number, block in _blocks(text):
        for sentence in _SENTENCE_END.split(block):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > MAX_WORDS:
                start = " ".join(words[:8])
                yield number, f"a sentence of {len(words)} words; at most {MAX_WORDS} are allowed: {start} ..."


def problems_of_code(source: str) -> Iterator[tuple[int, str]]:
    """The same for the docstrings and comments of a Python module; line numbers are those of their beginnings."""
    texts = [(node.lineno, node.value.value) for node in ast.walk(ast.parse(source)) if _is_docstring(node)]
    for comment in _COMMENT.finditer(source):
        texts.append((source.count("\n", 0, comment.start()) + 1, re.sub(r"^ *# ?", "", comment[0], flags=re.MULTILINE)))
    for number, text in texts:
        # An entry of 'Args:' is a paragraph of its own.
        paragraphs = re.sub(r"\n +(?=[\w, ]+: )", "\n\n", inspect.cleandoc(text))
        yield from ((number, problem) for _, problem in long_sentences(_NO_PROSE.sub("", paragraphs)))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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
    for file in [Path(name).resolve() for name in names] or [*PAGES, *PACKAGE]:
        check = problems_of_code if file.suffix == ".py" else problems
        for number, problem in sorted(check(file.read_text(encoding="utf-8"))):
            print(f"{os.path.relpath(file)}:{number}: {problem}")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
