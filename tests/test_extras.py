"""What is missing names the extra that brings it: every package of every extra, in Python and on the command line."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dvora.extras import how_to_install, missing

MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
EXTRAS = ("peft", "cli", "report")
WITHOUT = """
import sys
from dvora.cli.__main__ import main

class Absent:
    def find_spec(self, name, path, target=None):
        if name == absent:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())

for absent, _, *arguments in (line.split() for line in sys.stdin):
    sys.argv = ["dvora", *arguments]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""
COMMANDS = """typer cli --help
yaml cli train --print-config
matplotlib report report .
"""
"""The package that is not there, the extra that brings it, a command that needs it."""


def brought() -> dict[str, str]:
    """The first extra with each module; an extra's metadata repeats what it takes from another."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("dvora") or ()]
    # What is always there may be newer in an extra.
    always = {"dvora", *(each.name for each in requirements if not each.marker)}
    found: dict[str, str] = {}
    for extra in EXTRAS:
        for each in requirements:
            if each.marker and f'extra == "{extra}"' in str(each.marker) and each.name not in always:
                found.setdefault(MODULES.get(each.name, each.name), extra)
    return found


@pytest.mark.parametrize(("module", "extra"), brought().items())
def test_each_module_leads_to_its_extra(module: str, extra: str) -> None:
    message = missing(ModuleNotFoundError(name=module))
    assert message == f"{module} is missing; {how_to_install(extra)}"


def test_what_is_no_missing_module_of_an_extra() -> None:
    too_old = missing(ImportError("no such name", name="peft.utils"))
    assert too_old == f"dvora does not work with the installed peft (no such name); {how_to_install('peft')}"
    assert missing(ModuleNotFoundError(name="somebodys_code")) is None
    assert missing(ImportError("cannot import name")) is None


def test_commands_without_their_extras_are_a_line_each(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT], input=COMMANDS, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert ended.stdout.split() == ["2"] * 3
    lines = [line for line in ended.stderr.splitlines() if "Error" in line]
    needed = [line.split()[:2] for line in COMMANDS.splitlines()]
    assert lines == [f"Error: {absent} is missing; {how_to_install(extra)}" for absent, extra in needed]
    assert not any(tmp_path.iterdir())
