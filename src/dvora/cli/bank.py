"""`dvora bank`: thousands of adapters as one file, and from it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import check_writable
from .options import NewFolder, command
from .output import Output
from .progress import counting

MANY = 12
"""Adapters that a terminal shows."""
APack = Annotated[Path, typer.Argument(help="A file of `dvora bank pack`.")]

app = typer.Typer(no_args_is_help=True, help="Pack thousands of adapters into one file for dvora.AdapterBank.")


@app.command()
@command
def pack(
    adapters: Annotated[Path, typer.Argument(help="Folder with a folder in it for each adapter or run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; replaced if it is there.")],
    shown: Output,
) -> None:
    """Pack all adapters of a folder into one file, from which a bank loads each when it is first used.

    The file holds each adapter byte for byte. Equal adapters make equal files;
    a file of that name is replaced when the new one is complete.

    Example: dvora bank pack adapters --output adapters.dvora
    """
    check_writable(output)
    from ..recipes.adapters import packing
    from ..recipes.files import typed

    with counting("packed", shown.quiet) as on_progress:
        packed = packing.pack(adapters, typed(output), on_progress)
    shown.result(_shown(packed, shown), f"Packed adapters in {output}")
    shown.next_step("dvora", "bank", "inspect", str(output))


@app.command()
@command
def unpack(file: APack, output: NewFolder, shown: Output) -> None:
    """Write the adapters of a packed file into a new folder: a folder for each, byte for byte what was packed.

    Example: dvora bank unpack adapters.dvora --output unpacked
    """
    from ..adapter_file import packs

    with counting("unpacked", shown.quiet) as on_progress:
        packs.unpack(file, output, on_progress)
    values = {"file": str(file), "output": str(output), "count": len([*output.iterdir()])}
    shown.result(values, f"Unpacked adapters in {output}")
    shown.next_step("dvora", "inspect", str(output / "NAME"))


@app.command()
@command
def inspect(file: APack, shown: Output) -> None:
    """Show what a packed file holds: how many adapters of which kinds, bytes an adapter, names and digests.

    Examples:

    \b
    dvora bank inspect adapters.dvora
    dvora bank inspect adapters.dvora --json
    """
    from ..recipes.adapters.packing import inspect_pack

    packed = inspect_pack(file)
    shown.result(_shown(packed, shown), f"Packed adapters in {file}")
    if not shown.as_json and (more := packed["count"] - MANY) > 0:
        shown.note(f"{more:,} more adapters are in it; --json names all")
    shown.next_step("dvora", "bank", "unpack", str(file), "--output", "unpacked")


def _shown(packed: dict[str, Any], shown: Output) -> dict[str, Any]:
    """Everything, or what fits a terminal: the first adapters."""
    return packed if shown.as_json else {**packed, "adapters": packed["adapters"][:MANY]}
