"""How a command ends when it cannot do its work: one line on stderr, and an exit code."""

import _thread
import errno
import os
import re
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperGroup

from ..extras import missing
from ..text import nearest
from .output import print_line, quiet_packages, results_alone

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed, the command was used wrongly, Ctrl-C (as shells number it). Zero is fine."""


_ADVICE: dict[int | None, str] = {
    errno.ENOSPC: "no space left; free some, or choose a folder on another disk",
    errno.EDQUOT: "no space left in your quota; free some, or choose a folder on another disk",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "permission denied; change the permissions, or choose another one",
}
"""What to do about errors of the system, by their number."""
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")
_TYPERS_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What all errors in a command line are; Typer has no public name for it."""


def check_there(*paths: str | Path | None) -> None:
    """Refuse files and folders that are not there, before libraries are imported that take seconds.

    Raises:
        ValueError: one is not.
    """
    for path in paths:
        if path is not None and not Path(path).exists():
            raise ValueError(f"{path}: no such file or folder")


def check_page(page: Path) -> None:
    """Refuse a name under which no page can be written, before the work begins.

    Raises:
        ValueError: it does not end in .html, or there is no such folder.
        OSError: nothing can be written there.
    """
    if page.suffix != ".html":
        raise ValueError(f"--output {page}: the report is a page, so its name has to end in .html")
    check_writable(page)


def check_writable(file: Path) -> None:
    """Refuse a file that cannot be written, before the work begins.

    Raises:
        ValueError: there is no such folder, or the name is one of a folder.
        OSError: nothing can be written there.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--output {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError(f"--output {file}: it is a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one line and an exit code, and keep stdout for results.

    A ValueError is about what was given: an option, a file, what is in it.

    Args:
        debug: show the traceback too.
    """
    before, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        with results_alone(), nullcontext() if debug else quiet_packages(), warnings.catch_warnings():
            # Of one library for the authors of another; nobody at a terminal can do anything about them.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except BrokenPipeError:
        # The reader of our output is gone; Python would report it once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        print_line("stopped")
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:  # no traceback unless --debug asks for it
        if debug:
            for line in traceback.format_exc().splitlines():
                print_line(line)
        advice = missing(error) if isinstance(error, ImportError) else None
        print_line(f"Error: {advice or _message(error)}")
        raise typer.Exit(WRONG_USE if advice or isinstance(error, ValueError) else FAILED) from None
    finally:
        sys.unraisablehook = before


def _interrupt_again(unraisable: Any) -> None:
    """Of a Ctrl-C that came while an object was freed Python says only that it is ignored, and goes on."""
    if unraisable.exc_type is KeyboardInterrupt:
        # Later: in here it would be ignored as well.
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _message(error: Exception) -> str:
    """The message of an error, in one line."""
    text = " ".join(str(error).split())
    place = error.filename if isinstance(error, OSError) else None
    if advice := _ADVICE.get(_system_error(error, text)):
        return f"{place or 'a file could not be written'}: {advice}"
    if isinstance(error, FileNotFoundError) and not place:
        # Only the system's question for the working directory names no file.
        return "the folder that this command was started in is gone; change to one that is there"
    if isinstance(error, OSError) and error.strerror and place:
        return f"{place}: {error.strerror}"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _system_error(error: Exception, text: str) -> int | None:
    """The errno of an error; libraries that are not written in Python put it into words."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors is written in Rust.
    if code := re.search(r"\(os error (\d+)\)", text):
        return int(code[1])
    # torch says no more than that its archive is incomplete.
    return errno.ENOSPC if any(word in text for word in _TORCH_WRITES) and "Reader" not in text else None


class Commands(TyperGroup):
    """The commands of the program, whose mistyped options are an error of one line as every other."""

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
        message = " ".join(str(cast(Any, error).format_message()).replace("Value error, ", "").split())
        if not message or "Usage:" in message:
            # It is no error: the help is shown where nothing was typed.
            raise
        context = cast(Any, error).ctx
        if context and (typed := vars(error).get("option_name")):
            options = [name for parameter in context.command.params for name in parameter.opts if name[:2] == "--"]
            near = nearest_option(typed, options)
            message = f"No such option {typed}" + (f", did you mean {near}" if near else "")
        program = context.command_path if context else "dvora"
        print_line(f"Error: {message.rstrip('.?')}; {program} --help shows what there is")
        raise typer.Exit(WRONG_USE) from None


def nearest_option(typed: str, options: Sequence[str]) -> str | None:
    """The option that was probably meant: by its initials (--lr), by one of its words (--steps), or by its letters."""
    name = typed.lstrip("-").replace("_", "-").lower()
    words = {option: option.lstrip("-").split("-") for option in options}
    initials = [option for option, parts in words.items() if "".join(part[0] for part in parts) == name]
    words_in_common = [option for option, parts in words.items() if name in parts]
    return next(iter((*initials, *nearest(f"--{name}", options), *words_in_common)), None)
