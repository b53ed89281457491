"""stdout for results alone: what libraries print when they are imported and while they work goes to stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

import typer

from ..tools.pages.cells import visible

LONGEST = 2000
"""Letters of a message: errors repeat what is in files, whatever its length."""
_kept: ContextVar[TextIO | None] = ContextVar("kept", default=None)


@contextmanager
def kept_stdout() -> Iterator[TextIO]:
    """Send what is printed to stderr, and give the stream for results."""
    kept = _kept.get()
    if kept is not None:
        yield kept
        return
    token = _kept.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield results()
    finally:
        _kept.reset(token)


def tell(text: str) -> None:
    """Say something on stderr, in one line in which nothing of a file does anything to the terminal."""
    shown = visible(text)
    typer.echo(shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}...", err=True)


def results() -> TextIO:
    """The stream for results: stdout, also while it is kept."""
    return _kept.get() or sys.stdout
