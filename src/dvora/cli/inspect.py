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
COLUMNS = {
    "rank": ("rank", "of the update"),
    "norm_of_magnitude": ("magnitude", "norm of the vector of trained row norms"),
    "norm_of_lambda_b": ("lambda_b", "norm of the vector that scales the outputs; zero before training"),
    "norm_of_lambda_d": (
        "lambda_d",
        "norm of the vector that scales the rank; 0.1 times the root of the rank at first",
    ),
    "angle_mean": ("angle", "between a row of the weight before and after, mean in degrees"),
    "angle_max": ("largest", "the largest of these angles"),
    "norm_ratio": ("update", "norm of a row with the update, before rescaling, over its norm without; mean"),
    "gain_distance": ("gain", "factor that rescales a row to its trained norm: mean distance from one"),
}
"""Of the table of layers: what a terminal shows for a name, and what it means."""
CHANGES = ("angle_mean", "angle_max", "norm_ratio", "gain_distance")
"""Columns shown if the base is given; else the norms of the vectors are."""


def inspect_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    model: Annotated[str | None, typer.Option(help="The base: show how far each layer was moved.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter is: method, base, ranks, sizes, seed and fingerprint, and numbers of each layer.

    Reads safetensors only; pickled adapters are refused.
    """
    with one_line(debug):
        from ..recipes.adapters.inspection import inspect

        found = inspect(adapter, model).to_dict()
        shown, title = Output(as_json, quiet), f"Adapter in {adapter}"
        if as_json:
            shown.result(found, title)
        else:
            columns = _columns(found.get("layers", []))
            legend = {COLUMNS[name][0]: COLUMNS[name][1] for name in columns}
            shown.result(_fitting(found, columns), title, legend)
        shown.next_step("dvora", "doctor", str(adapter), why="checks that it is right")


def _columns(layers: list[dict[str, Any]]) -> list[str]:
    """What is shown of each layer: its rank where that differs, and either the changes or the norms."""
    given = [name for name in COLUMNS if any(name in row for row in layers)]
    wanted = [name for name in given if name in CHANGES] or [name for name in given if name.startswith("norm_of_")]
    differing = len({row["rank"] for row in layers}) > 1
    return [*["rank"] * differing, *wanted]


def _fitting(found: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """What fits a terminal: of many targets the endings of their names, and of each layer some columns."""
    found["ranks"] = [f"{rank} in {count} layers" for rank, count in found["ranks"].items()]
    if "settings" in found:
        found["settings"] = {name: value for name, value in found["settings"].items() if value is not None}
    targets = found.get("targets")
    if isinstance(targets, list) and len(targets) > MANY:
        found["targets"] = sorted({name.rpartition(".")[2] for name in targets})
    if "layers" in found:
        found["layers"] = [
            {"layer": row["layer"], **{COLUMNS[name][0]: row.get(name) for name in columns}} for row in found["layers"]
        ]
    return found
