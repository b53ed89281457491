"""`dvora inspect`: what an adapter is."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora inspect adapter

    dvora inspect adapter --model base --json
"""


def inspect_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    model: Annotated[
        str | None, typer.Option(help="The base: also tell angle, norm ratio and gain of each layer.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell what an adapter is: method, base, ranks, sizes, seed and fingerprint, and figures of each layer.

    Reads safetensors only; pickled adapters are refused.
    """
    with one_line(debug):
        from ..recipes.inspection import inspect

        Output(as_json, quiet).result(inspect(adapter, model).told(), f"Adapter in {adapter}")
