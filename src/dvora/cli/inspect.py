"""`dvora inspect`: what an adapter is."""

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from .errors import check_there, one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora inspect adapter

    dvora inspect adapter --all

    dvora inspect adapter --model base --json
"""
MANY = 12
NORMS = {
    "norm_of_magnitude": ("magnitude", "norm of the vector of trained row norms"),
    "norm_of_lambda_b": ("lambda_b", "norm of the vector that scales the outputs; zero before training"),
    "norm_of_lambda_d": (
        "lambda_d",
        "norm of the vector that scales the rank; 0.1 times the root of the rank at first",
    ),
}
CHANGES = {
    "angle_mean": ("angle", "between a row of the weight before and after, mean in degrees"),
    "angle_max": ("widest", "the largest of these angles"),
    "norm_ratio": ("update", "norm of a row with the update, before rescaling, over its norm without; mean"),
    "gain_distance": ("gain", "factor that rescales a row to its trained norm: mean distance from one"),
}
"""Of each layer: what a terminal shows for a name, and what it means; the changes where the base is given."""


def inspect_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    model: Annotated[str | None, typer.Option(help="The base: show how far each layer was moved.")] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="Every layer, in place of the types of layers.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter is: method, base, ranks, sizes, seed and fingerprint, and numbers of its layers.

    Reads safetensors only; pickled adapters are refused.
    """
    with one_line(debug):
        check_there(adapter)
        from ..recipes.adapters.inspection import inspect

        found = inspect(adapter, model)
        shown, title = Output(as_json, quiet), f"Adapter in {adapter}"
        if as_json:
            shown.result(found, title)
        else:
            layers = found.pop("layers", [])
            columns = (CHANGES if model else NORMS) if layers else {}
            tables = (
                {"layers": _layers(layers, columns)} if every_layer else {"types of layers": _types(layers, columns)}
            )
            legend = dict(columns.values())
            if layers and not every_layer:
                legend["a/b/c"] = "smallest, median and largest of the layers; --all shows every layer"
            shown.result(_fitting(found) | (tables if layers else {}), title, legend)
        shown.next_step("dvora", "doctor", str(adapter), why="checks that it is right")


def _layers(layers: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"layer": row["layer"], "rank": row["rank"], **{short: row.get(name) for name, (short, _) in columns.items()}}
        for row in layers
    ]


def _types(layers: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    from ..tools.analysis import layer_type

    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        kinds.setdefault(layer_type(row["layer"]), []).append(row)
    return [
        {"type": kind, "layers": len(rows), **{short: _spread(rows, name) for name, (short, _) in columns.items()}}
        for kind, rows in kinds.items()
    ]


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{min(values):.3g}/{median(values):.3g}/{max(values):.3g}" if values else ""


def _fitting(found: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal: of many targets the endings of their names."""
    found["ranks"] = [f"{rank} in {count} layers" for rank, count in found["ranks"].items()]
    if "settings" in found:
        found["settings"] = {name: value for name, value in found["settings"].items() if value is not None}
    targets = found.get("targets")
    if isinstance(targets, list) and len(targets) > MANY:
        found["targets"] = sorted({name.rpartition(".")[2] for name in targets})
    return found
