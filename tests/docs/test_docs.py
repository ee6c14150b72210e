"""The documentation holds: Python blocks run, in the order in which they stand, and print what is shown; links lead somewhere."""

import re
import warnings

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from pages import PAGES, ROOT, anchors, blocks, prose, shown

from hf_teleport.lab.compare import protocol
from hf_teleport.projectors import base as registry

# Pages about a library that is not in every environment: timm imports a torchvision, which must fit the torch beside it.
NEEDS = {"peft.md": "peft", "trl.md": "trl", "timm.md": "timm"}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks(page, tmp_path, monkeypatch, capsys):
    if library := NEEDS.get(page.name):
        pytest.importorskip(library, reason=f"{library} does not import here", exc_type=Exception)
    if library == "trl":  # sets it by default
        warnings.filterwarnings("ignore", ".gradient_checkpointing. is deprecated", FutureWarning)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    names = {"__name__": "docs"}
    for block, output in shown(page):
        capsys.readouterr()
        exec(compile(block, page.name, "exec"), names)
        printed = iter(capsys.readouterr().out.splitlines())
        for line in (output or "").splitlines():
            assert any(alike(line, other) for other in printed), line


def alike(line, other):
    """Whether two lines are the same but for seconds, and for a fifth of what numbers with a point are: machines differ."""
    number = r"\d+\.\d+(?:e-?\d+)?"
    one, two = (re.sub(rf"(?:\d+ min )?(?:{number}|\d+) s\b", "some s", text.strip()) for text in (line, other))
    pairs = zip(re.findall(number, one), re.findall(number, two), strict=False)
    same_text = re.sub(number, "#", one) == re.sub(number, "#", two)
    return same_text and all(float(a) == pytest.approx(float(b), rel=0.2) for a, b in pairs)


def test_what_is_shown_is_compared():
    assert alike("loss 2.31 after 0.5 s", "loss 2.3104 after 12 s")
    assert alike("it may take 0.5 s", "it may take 1 min 9 s")
    assert not alike("loss 2.31", "loss 3.31")
    assert not alike("7 of 8 moved", "6 of 8 moved")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_yaml_blocks_have_real_keys_and_values(page, tmp_path):
    for block in blocks(page, "yaml"):
        settings = yaml.safe_load(block)
        if "distributed_type" in settings:
            file = tmp_path / "accelerate.yaml"
            file.write_text(block)
            assert load_config_from_file(str(file)).num_processes == settings["num_processes"]
        else:
            rest = {
                "dataset": "digits",
                "kind": "image",
                "model": "mlp",
                "output_dir": str(tmp_path),
                "eval_on_start": True,
                "use_cpu": True,
            }
            assert len(protocol({**rest, **settings}).whole.runs) > 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", prose(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), f"{target}#{heading}"


def test_tests_that_the_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"(?:\w+/)*test_\w+\.py", page.read_text()):
            assert (ROOT / "tests" / name.removeprefix("tests/")).exists(), (page.name, name)


def test_the_ci_runs_the_readme_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
