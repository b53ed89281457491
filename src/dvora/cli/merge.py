"""`dvora merge`: a model with an adapter in its weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError, one_line
from .output import Debug, Json, Output, Quiet, tell

EXAMPLES = """[bold]Examples[/bold]

    dvora merge adapter --output merged

    dvora merge adapter --model base --output merged-half --dtype bfloat16
"""


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    model: Annotated[str | None, typer.Option(help="The base; the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights.")] = "5GB",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model: a plain model folder with tokenizer, which needs nothing of dvora.

    The folder appears whole, and only if the merged model, loaded again, gives the adapted model's outputs.
    """
    with one_line(debug):
        from ..recipes.adapters_at_rest.merging import DTYPES, merge

        if dtype not in DTYPES:
            raise UsageError(f"unknown --dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        done = merge(adapter, output, model, dtype, shard_size)
        Output(as_json, quiet).result(asdict(done), f"Merged model in {output}")
        if done.warning and not as_json:
            tell(f"Warning: {done.warning}")
