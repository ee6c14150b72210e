"""No message to the user without a next step in it."""

import ast
import re

import pytest
from pages import ROOT

from hf_teleport.event.reasons import NO_STEP

# Words that allow something, ask for it, or say that nothing need be done.
STEP = re.compile(
    r"\b(allowed|must|give|use|pass|set|take|leave|name|make|choose|lower|smaller|raise|see|check|write|known|install|delete"
    r"|needed|nearest|did you mean|train for longer|cut|save_pretrained|call|add|start|run|try|tried again|nothing to do|evaluate"
    r"|repair|remove|correct|report|later|its own message)\b|pip install",
    re.IGNORECASE,
)

# What stands for a text that has the step in it: of `NO_STEP`, of a hint, of another error that is passed on.
CARRIES = re.compile(r"\{(_WAYS|_?problem|hint|error|why_immovable)\b|%s\.$")

# Raised with a way out by what makes them, or for those who write a method.
NOT_CHECKED = ("unsuited", "TypeError", "NotImplementedError")


def messages():
    """The place and the text of each error that is raised, and of each warning."""
    for file in sorted((ROOT / "hf_teleport").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], (ast.JoinedStr, ast.Constant)):
                continue
            name = ast.unparse(call.func)
            raised = isinstance(node, ast.Raise) and not name.endswith(NOT_CHECKED)
            if raised or name in ("logger.warning", "warnings.warn"):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(call.args[0]).strip("f'\"")


def has_step(text):
    return bool(STEP.search(re.sub(r"\{[^}]*\}", "", text)) or CARRIES.search(text))


def test_every_message_has_a_next_step():
    found = dict(messages())
    assert len(found) > 100
    assert not {place: text for place, text in found.items() if not has_step(text)}


@pytest.mark.parametrize("reason", list(NO_STEP))
def test_why_nothing_moved_has_a_next_step(reason):
    assert STEP.search(NO_STEP[reason])


def test_a_message_without_one_is_found():
    assert not has_step("the loss is {loss}")
    assert not has_step("there are no rows")
