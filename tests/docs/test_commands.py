"""Every command in a page, also in a table or a sentence, is one that the program takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from dvora.cli.app import app

ROOT = Path(__file__).parent.parent.parent
FILES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
HISTORY = {"changelog.md", "CHANGELOG.md"}
"""What was: commands that are gone are named there."""
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(dvora\s[^`]+)`")
TYPED = re.compile(r"^(?:.*\| )?(dvora .*)$")


def commands(page: str) -> set[str]:
    """Command lines in blocks of shell, and in code within text."""
    found = {" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", page))}
    for block in FENCE.findall(page):
        kind, *lines = block.replace("\\\n", " ").splitlines()
        if kind == "```console":
            # The other lines are output.
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if kind in ("```console", "```sh"):
            found |= {match[1] for line in lines if (match := TYPED.match(line))}
    return found


def check(line: str) -> None:
    """Parse a command line as the program does; a name of commands alone has to be one.

    Raises:
        Exception: of the parser.
    """
    _, *words = shlex.split(line.partition(" > ")[0].partition(" | ")[0], comments=True)
    command: Any = typer.main.get_command(app)
    context = command.make_context("dvora", [*words], resilient_parsing=True)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            assert {*words} <= {"--help", "--version"}, line
            return
        name, *words = words
        assert name in command.commands, f"there is no command {name}: {line}"
        command = command.commands[name]
    if words and words != ["--help"] and "--new-key" not in words:
        command.make_context(line, words, parent=context)


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in HISTORY], ids=lambda path: path.name)
def test_every_command_of_a_page_is_one(path: Path) -> None:
    for line in sorted(commands(path.read_text(encoding="utf-8"))):
        try:
            check(line)
        except Exception as error:
            pytest.fail(f"`{line}`: {type(error).__name__} {error}")


@pytest.mark.parametrize(
    "line",
    [
        "dvora bench base",
        "dvora convert adapter --to peft-dora --output new",
        "dvora convert adapter --to dora",
        "dvora merge adapter --outptu new",
        "dvora bank squeeze",
    ],
)
def test_what_the_program_does_not_take_is_noticed(line: str) -> None:
    assert commands(f"| a | `{line}` |\n```console\n$ {line}\ndvora is not typed\n```\n") == {line}
    with pytest.raises(Exception, match=r".") as raised:
        check(line)
    assert raised.type.__name__ != "AttributeError"
