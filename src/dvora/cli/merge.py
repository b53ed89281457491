"""`dvora merge`: a model with an adapter in its weights."""

from typing import Annotated

import typer

from ..recipes.adapters import Dtype
from .errors import check_there
from .options import AnAdapter, Base, NewFolder, command
from .output import Output


@command
def merge(
    adapter: AnAdapter,
    output: NewFolder,
    shown: Output,
    model: Base = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: the base's own.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights.")] = "5GB",
) -> None:
    """Merge an adapter into its base model: a plain model folder with tokenizer, which needs nothing of dvora.

    The folder appears whole, and only if the merged model, loaded again, gives the adapted model's outputs.

    Examples:

    \b
    dvora merge adapter --output merged
    dvora merge adapter --model base --output merged-half --dtype bfloat16
    """
    check_there(adapter)
    from ..recipes.adapters import merging

    values = merging.merge(adapter, output, model, dtype, shard_size)
    if not shown.as_json:
        # No loss where nothing was lost, no warning where there is none.
        needs = {"lost_worst": "lost_worst", "lost_layer": "lost_worst", "warning": "warning"}
        values = {name: value for name, value in values.items() if name not in needs or values[needs[name]]}
    shown.result(values, f"Merged model in {output}")
    if not shown.as_json:
        shown.note(f'Next: load it with transformers, from_pretrained("{output}"); it needs nothing of dvora')
