"""`dvora convert`: an adapter of one method as one of another."""

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.adapters import TARGETS, TO_LORA
from .errors import check_there, one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora convert adapter --to dora --output as-dora

    dvora convert vera-adapter --to dvora --output as-dvora --model base
"""


def _target(to: str) -> str:
    if to == "lora":
        raise typer.BadParameter(TO_LORA)
    if to not in TARGETS:
        raise typer.BadParameter(f"{to!r} is none of {', '.join(TARGETS)}")
    return to


def convert_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    to: Annotated[str, typer.Option(help="dora (from dvora) or dvora (from PEFT's vera).", callback=_target)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the adapter names")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert an adapter where that is exact: DVoRA to PEFT's DoRA, PEFT's VeRA to DVoRA.

    To LoRA it is not, and refused: DVoRA rescales rows of the weight, which no low rank can.
    """
    with one_line(debug):
        check_there(adapter)
        from ..recipes.adapters.conversion import convert

        shown = Output(as_json, quiet)
        shown.result(convert(adapter, to, output, model), f"Converted adapter in {output}")
        shown.next_step("dvora", "inspect", str(output))
