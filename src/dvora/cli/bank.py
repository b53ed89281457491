"""`dvora bank`: thousands of adapters as one file, and from it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import check_writable, one_line
from .output import Debug, Json, Output, Quiet

MANY = 12
"""Adapters that a terminal shows."""

app = typer.Typer(no_args_is_help=True, help="Pack thousands of adapters into one file for dvora.AdapterBank.")


@app.command("pack")
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

    Example: dvora bank pack adapters --output adapters.dvora
    """
    with one_line(debug):
        check_writable(output)
        from ..recipes.adapters.packing import pack
        from ..recipes.files import typed

        with _progress("packed", quiet) as on_progress:
            packed = pack(adapters, typed(output), on_progress)
        shown = Output(as_json, quiet)
        shown.result(_shown(packed, as_json), f"Packed adapters in {output}")
        shown.next_step("dvora", "bank", "inspect", str(output))


@app.command("unpack")
def unpack_command(
    file: Annotated[Path, typer.Argument(help="A file of `dvora bank pack`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the adapters of a packed file into a new folder: a folder for each, byte for byte what was packed.

    Example: dvora bank unpack adapters.dvora --output unpacked
    """
    with one_line(debug):
        from ..adapter_file.packs import unpack

        with _progress("unpacked", quiet) as on_progress:
            unpack(file, output, on_progress)
        shown = Output(as_json, quiet)
        values = {"file": str(file), "output": str(output), "count": len([*output.iterdir()])}
        shown.result(values, f"Unpacked adapters in {output}")
        shown.next_step("dvora", "inspect", str(output / "NAME"))


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A file of `dvora bank pack`.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a packed file holds: how many adapters of which kinds, bytes an adapter, names and digests.

    Examples:

    \b
    dvora bank inspect adapters.dvora
    dvora bank inspect adapters.dvora --json
    """
    with one_line(debug):
        from ..recipes.adapters.packing import inspect_pack

        packed = inspect_pack(file)
        shown = Output(as_json, quiet)
        shown.result(_shown(packed, as_json), f"Packed adapters in {file}")
        if not as_json and (more := packed["count"] - MANY) > 0:
            shown.note(f"{more:,} more adapters are in it; --json names all")
        shown.next_step("dvora", "bank", "unpack", str(file), "--output", "unpacked")


def _shown(packed: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Everything, or what fits a terminal: the first adapters."""
    return packed if as_json else {**packed, "adapters": packed["adapters"][:MANY]}


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What is to be called with progress: a bar, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
