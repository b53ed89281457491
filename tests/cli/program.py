"""The program in this process: what a shell would see of it."""

import contextlib
import io
import shlex
from typing import NamedTuple

from dvora.cli.app import app


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def run(command: str) -> Ended:
    """Run a command line that begins with "dvora"."""
    program, *arguments = shlex.split(command)
    assert program == "dvora"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(arguments, prog_name="dvora")
        except SystemExit as end:
            return Ended(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("the program did not end")


def assert_ends_with_one_line(ended: Ended, code: int, message: str) -> None:
    """The command failed with this code and nothing but one line on stderr that contains the message."""
    assert ended.code == code, ended.stderr
    assert ended.stdout == ""
    assert message in ended.stderr
    assert ended.stderr.startswith("Error: ")
    assert ended.stderr.count("\n") == 1


def assert_refused(command: str, message: str) -> None:
    """The command fails with one line on stderr that contains the message."""
    ended = run(command)
    assert ended.code != 0
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
