"""`dvora inspect`: what an adapter is."""

from statistics import median
from typing import Annotated, Any

import typer

from .errors import check_there
from .options import AnAdapter, command
from .output import Output

MANY = 12
NORMS = {
    "norm_of_magnitude": ("magnitude", "norm of the vector of trained row norms"),
    "norm_of_lambda_b": ("lambda_b", "norm of the vector that scales the outputs; zero before training"),
    "norm_of_lambda_d": (
        "lambda_d",
        "norm of the vector that scales the rank; 0.1 times the root of the rank (of rank times groups) at first",
    ),
}
CHANGES = {
    "angle_mean": ("angle", "between a row of the weight before and after, mean in degrees"),
    "angle_max": ("widest", "the largest of these angles"),
    "norm_ratio": ("update", "norm of a row with the update, before rescaling, over its norm without; mean"),
    "gain_distance": ("gain", "factor that rescales a row to its trained norm: mean distance from one"),
}
"""Of each layer: what a terminal shows for a name, and what it means; the changes where the base is given."""


@command
def inspect(
    adapter: AnAdapter,
    shown: Output,
    model: Annotated[str | None, typer.Option(help="The base: show how far each layer was moved.")] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="Every layer, in place of the types of layers.")] = False,
) -> None:
    """Show what an adapter is: method, base, ranks, sizes, seed and fingerprint, and numbers of its layers.

    Reads safetensors only; pickled adapters are refused.

    Examples:

    \b
    dvora inspect adapter
    dvora inspect adapter --all
    dvora inspect adapter --model base --json
    """
    check_there(adapter)
    from ..recipes.adapters import inspection

    values, legend = inspection.inspect(adapter, model), {}
    if not shown.as_json:
        values["ranks"] = [f"{rank} in {count} layers" for rank, count in values["ranks"].items()]
        if "settings" in values:
            values["settings"] = {name: value for name, value in values["settings"].items() if value is not None}
        if isinstance(targets := values["targets"], list) and len(targets) > MANY:
            # What fits a terminal: the endings of their names.
            values["targets"] = sorted({name.rpartition(".")[2] for name in targets})
        if layers := values.pop("layers", []):
            columns = CHANGES if model else NORMS
            legend = dict(columns.values())
            if every_layer:
                names = {"layer": "layer", "rank": "rank", **{key: name for key, (name, _) in columns.items()}}
                values["layers"] = [{name: row.get(key) for key, name in names.items()} for row in layers]
            else:
                values["types of layers"] = _types(layers, {key: name for key, (name, _) in columns.items()})
                legend["a/b/c"] = "smallest, median and largest of the layers; --all shows every layer"
    shown.result(values, f"Adapter in {adapter}", legend)
    shown.next_step("dvora", "doctor", str(adapter), why="checks that it is right")


def _types(layers: list[dict[str, Any]], columns: dict[str, str]) -> list[dict[str, Any]]:
    from ..tools.analysis import layer_type

    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        kinds.setdefault(layer_type(row["layer"]), []).append(row)
    return [
        {"type": kind, "layers": len(rows), **{name: _spread(rows, key) for key, name in columns.items()}}
        for kind, rows in kinds.items()
    ]


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.3g}/{median(values):.3g}/{max(values):.3g}" if values else ""
