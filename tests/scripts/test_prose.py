"""The check of the prose: what it finds, what it lets pass, and that the pages and the package pass."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prose.py"
sys.path.insert(0, str(ROOT / "scripts"))

import prose  # noqa: E402

LONG_SENTENCE = "One" + " word" * 30 + "."
LONG_LINE = "Word. " * 21


def found(text):
    return list(prose.problems(text))


def test_a_long_line_is_found():
    assert found(f"Short.\n\n{'Word. ' * 19}Words.\n") == []
    ((line, problem),) = found(f"Short.\n\n{LONG_LINE}\n")
    assert line == 3
    assert "126 characters; at most 120" in problem


@pytest.mark.parametrize("around", ["{}", "- {}", "1. {}", "> {}", "Short. {} Short.", "| a | {} |", "(**Bold.** {})"])
def test_a_long_sentence_is_found(around):
    text = around.format(LONG_SENTENCE)
    text = text if text.startswith("|") else textwrap.fill(text, 100)
    ((line, problem),) = found(f"Short.\n\n{text}\n")
    assert line == 3
    assert "31 words; at most 30" in problem


@pytest.mark.parametrize(
    "text",
    [
        textwrap.fill("One" + " word" * 29 + "."),
        textwrap.fill("One" + " word" * 20 + ". Two" + " word" * 20 + "! Three" + " word" * 20),
        "- one" + " word" * 20 + "\n- two" + " word" * 20,
        f"```text\n{LONG_LINE}\n{LONG_SENTENCE}\n```",
        f"A formula:\n\n    {LONG_LINE}\n\nA word.",
        f"| a table | {LONG_LINE} |",
        "| a" + " word" * 20 + "; b" + " word" * 20 + " |",
        f"https://example.org/{'a' * 120}",
        textwrap.fill("One" + " word" * 28 + " `code\nwith many words`."),
        "One" + " word" * 27 + f" [a link](https://example.org/{'a' * 120}).",
        "<!-- " + LONG_SENTENCE + " -->",
    ],
)
def test_what_is_allowed_passes(text):
    assert found(f"{text}\n") == []


CODE = """\"\"\"Short.

Args:
    one: {words}.
    two: {words}.
\"\"\"

# {words}
# {words}
x = "{words} {words}"
"""


def test_a_long_sentence_in_a_docstring_or_comment_is_found():
    assert list(prose.problems_of_code(CODE.format(words="word " * 14))) == []
    found = list(prose.problems_of_code(CODE.format(words="word " * 31)))
    assert [line for line, _ in found] == [1, 1, 8]
    assert "at most 30" in found[0][1]


def test_the_command_names_page_and_line_and_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{LONG_LINE}\n")
    done = subprocess.run([sys.executable, SCRIPT, page], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("page.md:3: a line of 126 characters")


def test_all_pages_and_the_package_pass():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
