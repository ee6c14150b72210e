"""The oldest and the newest versions that the package supports: `nox`, or with some tests only `nox -- tests/test_trainer.py`.

Each session fills an environment of its own in .nox with several GB; docs/versions.md tells what was run.
"""

from configparser import RawConfigParser
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"


@nox.session
def oldest(session: nox.Session) -> None:
    """The lowest version of each library that setup.cfg asks for; the extras' libraries as new as those allow."""
    settings = RawConfigParser()
    settings.read("setup.cfg")
    lowest = Path(session.create_tmp()) / "lowest.txt"
    lowest.write_text(settings["options"]["install_requires"].replace(">=", "=="))
    _test(session, "--constraint", str(lowest))


@nox.session
def newest(session: nox.Session) -> None:
    """The newest version of each library that the package index offers, not those of constraints.txt."""
    _test(session, "--upgrade", "--upgrade-strategy", "eager")


def _test(session: nox.Session, *install: str) -> None:
    session.install(*install, "--editable", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)
