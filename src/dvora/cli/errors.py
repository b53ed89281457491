"""How a command ends when it cannot do its work: one line on stderr, and an exit code."""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperGroup

from ..extras import missing
from .streams import kept_stdout, tell

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed, the command was used wrongly, Ctrl-C (as shells number it). Zero is fine."""


_FULL = "no space left; free some, or choose a folder on another disk"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "no space left in your quota; free some, or choose a folder on another disk",
    errno.EFBIG: "file too large for this disk or for the limit of this shell (ulimit -f); choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "permission denied; change the permissions, or choose another one",
    errno.EPERM: "not permitted; change the permissions, or choose another one",
}
"""What to do about errors of the system, by their number."""
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")
_TYPERS_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What all errors in a command line are; Typer has no public name for it."""


class UsageError(ValueError):
    """The command was used wrongly: an argument, a configuration, a file that is not what it should be."""


def check_page(page: Path) -> None:
    """Refuse a name under which no page can be written.

    Raises:
        UsageError: it does not end in .html, or there is no such folder.
    """
    if page.suffix != ".html":
        raise UsageError(f"--output {page}: the report is a page, so its name has to end in .html")
    if not page.absolute().parent.is_dir():
        raise UsageError(f"--output {page}: there is no folder {page.parent}")


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one line and an exit code, and keep stdout for results.

    Args:
        debug: show the traceback too.
    """
    interrupts: list[int] = []
    try:
        with kept_stdout(), _noted(interrupts):
            yield
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        tell("stopped")
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:  # whatever it is, nobody wants to read a traceback who did not ask for it
        if interrupts:
            # Libraries in C++ take an interrupt for a failure of their own.
            tell("stopped")
            raise typer.Exit(INTERRUPTED) from None
        if debug:
            for line in traceback.format_exc().splitlines():
                tell(line)
        wrong_use = isinstance(error, UsageError) or _lacks_an_extra(error)
        tell(f"Error: {_told(error)}")
        raise typer.Exit(WRONG_USE if wrong_use else FAILED) from None


@contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Note every Ctrl-C beside raising KeyboardInterrupt, unless somebody else handles or ignores it."""

    def note(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _lacks_an_extra(error: Exception) -> bool:
    return isinstance(error, ImportError) and missing(error) is not None


def _told(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, ImportError) and (told := missing(error)):
        return told
    text = " ".join(str(error).split())
    place = error.filename if isinstance(error, OSError) else None
    if (number := _system_error(error, text)) in _ADVICE:
        return f"{place or 'a file could not be written'}: {_ADVICE[number]}"
    if isinstance(error, OSError) and error.strerror and place:
        return f"{place}: {error.strerror}"
    if isinstance(error, RecursionError):
        return "something in these files is nested too deeply"
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


def _system_error(error: Exception, text: str) -> int | None:
    """The system's number of an error, which libraries that are not written in Python tell in words."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors is written in Rust.
    if found := re.search(r"\(os error (\d+)\)", text):
        return int(found[1])
    # torch tells no more than that its archive is incomplete.
    return errno.ENOSPC if any(word in text for word in _TORCH_WRITES) and "Reader" not in text else None


class Commands(TyperGroup):
    """The commands of the program, whose mistyped options are told in one line as every other error is."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the options of the program itself."""
        with _typed_wrongly():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of a command, and run it."""
        with _typed_wrongly():
            return super().invoke(ctx)


@contextmanager
def _typed_wrongly() -> Iterator[None]:
    try:
        yield
    except _TYPERS_ERROR as error:
        told = " ".join(str(cast(Any, error).format_message()).split())
        if not told or "Usage:" in told:
            # It is no error: the help is shown where nothing was typed.
            raise
        context = cast(Any, error).ctx
        program = context.command_path if context else "dvora"
        tell(f"Error: {told.rstrip('.?')}; {program} --help shows what there is")
        raise typer.Exit(WRONG_USE) from None
