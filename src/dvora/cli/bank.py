"""`dvora bank`: thousands of adapters as one file, and from it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import check_writable, one_line
from .output import Debug, Json, Output, Quiet, print_line

PACK_EXAMPLES = """[bold]Examples[/bold]

    dvora bank pack adapters --output adapters.dvora
"""
UNPACK_EXAMPLES = """[bold]Examples[/bold]

    dvora bank unpack adapters.dvora --output unpacked
"""
INSPECT_EXAMPLES = """[bold]Examples[/bold]

    dvora bank inspect adapters.dvora

    dvora bank inspect adapters.dvora --json
"""
MANY = 12
"""Adapters that a terminal shows."""
SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""

app = typer.Typer(no_args_is_help=True, help="Pack thousands of adapters into one file for dvora.AdapterBank.")


@app.command("pack", epilog=PACK_EXAMPLES)
def pack_command(
    adapters: Annotated[Path, typer.Argument(help="Folder with a folder in it for each adapter or run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; replaced if it is there.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pack all adapters of a folder into one file, from which a bank loads each when it is first used.

    The file holds each adapter byte for byte. Equal adapters make equal files;
    a file of that name is replaced when the new one is complete.
    """
    with one_line(debug):
        check_writable(output)
        from ..recipes.adapters.packing import pack
        from ..recipes.files import typed

        with _progress("packed", quiet) as on_progress:
            done = pack(adapters, typed(output), on_progress)
        shown = Output(as_json, quiet)
        values = done
        shown.result(values if as_json else _fitting(values), f"Packed adapters in {output}")
        shown.next_step("dvora", "bank", "inspect", str(output))


@app.command("unpack", epilog=UNPACK_EXAMPLES)
def unpack_command(
    file: Annotated[Path, typer.Argument(help="A file of `dvora bank pack`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the adapters of a packed file into a new folder: a folder for each, byte for byte what was packed."""
    with one_line(debug):
        from ..bank.packs import unpack

        count = 0

        def counted(done: int, of: int) -> None:
            nonlocal count
            count = done
            on_progress(done, of)

        with _progress("unpacked", quiet) as on_progress:
            unpack(file, output, counted)
        shown = Output(as_json, quiet)
        shown.result({"file": str(file), "output": str(output), "count": count}, f"Unpacked adapters in {output}")
        shown.next_step("dvora", "inspect", str(output / "NAME"))


@app.command("inspect", epilog=INSPECT_EXAMPLES)
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A file of `dvora bank pack`.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a packed file holds: how many adapters of which kinds, bytes an adapter, names and digests."""
    with one_line(debug):
        from ..recipes.adapters.packing import inspect_pack

        values = inspect_pack(file)
        shown = Output(as_json, quiet)
        shown.result(values if as_json else _fitting(values), f"Packed adapters in {file}")
        if not as_json and len(values["adapters"]) > MANY:
            shown.note(f"{len(values['adapters']) - MANY:,} more adapters are in it; --json names all")
        shown.next_step("dvora", "bank", "unpack", str(file), "--output", "unpacked")


def _fitting(values: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal: the first adapters."""
    return {**values, "adapters": values["adapters"][:MANY]}


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What is to be called with progress: a bar on a terminal, else a line now and then."""
    if quiet:
        yield lambda done, of: None
    elif not sys.stderr.isatty():
        last = time.monotonic()

        def line(done: int, of: int) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS:
                last = time.monotonic()
                print_line(f"{what} {done:,} of {of:,} adapters")

        yield line
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
