"""`dvora merge`: a model with an adapter in its weights."""

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.adapters import Dtype
from .errors import check_there, one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora merge adapter --output merged

    dvora merge adapter --model base --output merged-half --dtype bfloat16
"""


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the adapter names")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: the base's own.")] = "auto",
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

        values = merge(adapter, output, model, dtype, shard_size)
        shown = Output(as_json, quiet)
        if not as_json:
            # No loss where nothing was lost, no warning where there is none.
            none = {name for name in ("lost_worst", "warning") if not values[name]}
            values = {name: value for name, value in values.items() if name not in none}
            if "lost_worst" in none:
                del values["lost_layer"]
        shown.result(values, f"Merged model in {output}")
        if not as_json:
            shown.note(f'Next: load it with transformers, from_pretrained("{output}"); it needs nothing of dvora')
