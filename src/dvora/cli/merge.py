"""`dvora merge`: a model with an adapter in its weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.adapters import DTYPES
from .errors import check_there, one_line, one_of
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora merge adapter --output merged

    dvora merge adapter --model base --output merged-half --dtype bfloat16
"""


def _dtype(dtype: str) -> str:
    return one_of(dtype, DTYPES)


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the adapter names")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.", callback=_dtype)
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights.")] = "5GB",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model: a plain model folder with tokenizer, which needs nothing of dvora.

    The folder appears whole, and only if the merged model, loaded again, gives the adapted model's outputs.
    """
    with one_line(debug):
        check_there(adapter)
        from ..recipes.adapters.merging import merge

        done = merge(adapter, output, model, dtype, shard_size)
        shown = Output(as_json, quiet)
        values = asdict(done) if as_json else _without_nothing(asdict(done))
        shown.result(values, f"Merged model in {output}")
        if not as_json:
            shown.note(f'Next: load it with transformers, from_pretrained("{output}"); it needs nothing of dvora')


def _without_nothing(values: dict[str, Any]) -> dict[str, Any]:
    """Without empty values: no loss where nothing was lost, no warning where there is none."""
    kept = {name: value for name, value in values.items() if value or name == "difference"}
    return kept if values["lost_worst"] else {name: value for name, value in kept.items() if name != "lost_layer"}
