"""How a command ends when it cannot do its work: one line on stderr, and an exit code."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import typer

from .streams import kept_stdout

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed, the command was used wrongly, Ctrl-C (as shells number it). Zero is fine."""


class UsageError(ValueError):
    """The command was used wrongly: an argument, a configuration, a file that is not what it should be."""


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one line and an exit code, and keep stdout for results.

    Args:
        debug: show the traceback too.
    """
    try:
        with kept_stdout():
            yield
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:  # whatever it is, nobody wants to read a traceback who did not ask for it
        if debug:
            traceback.print_exc()
        typer.echo(f"Error: {_told(error)}", err=True)
        raise typer.Exit(WRONG_USE if isinstance(error, UsageError) else FAILED) from None


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Keep stdout for the result: libraries write to it when they are imported and while they work."""
    with redirect_stdout(sys.stderr):
        yield


def _told(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def wrong_input() -> Iterator[None]:
    """Around work that finds fault with nothing but its input: a ValueError there is the user's."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
