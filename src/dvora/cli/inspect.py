"""`dvora inspect`: what an adapter is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora inspect adapter

    dvora inspect adapter --model base --json
"""
MANY = 12
NORM = "norm_of_"


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
        from ..recipes.adapters_at_rest.inspection import inspect

        told = inspect(adapter, model).told()
        Output(as_json, quiet).result(told if as_json else _fitting(told), f"Adapter in {adapter}")


def _fitting(told: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal: endings of long lists of layers, and either what was done to the weights or norms."""
    targets = told.get("targets")
    if isinstance(targets, list) and len(targets) > MANY:
        told["targets"] = sorted({name.rpartition(".")[2] for name in targets})
    for row in told.get("layers", ()):
        for name in [name for name in row if name.startswith(NORM)]:
            value = row.pop(name)
            if "angle_mean" not in row:
                row[name.removeprefix(NORM)] = value
    return told
