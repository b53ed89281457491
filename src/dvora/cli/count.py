"""`dvora count`: how much an adapter trains."""

from typing import Annotated

import typer

from .options import command
from .output import Output


@command
def count(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub.")],
    shown: Output,
    targets: Annotated[str, typer.Option(help="Layers to adapt, with commas.", show_default="all linear layers")] = "",
    rank: Annotated[list[int] | None, typer.Option(help="May be given again.", show_default="usual ones")] = None,
    lambda_d_groups: Annotated[int, typer.Option(help="Groups of inputs with a lambda_d each, of DVoRA.")] = 1,
    task_type: Annotated[
        str | None, typer.Option(help="SEQ_CLS, CAUSAL_LM ...: with its head.", show_default="as it was saved")
    ] = None,
) -> None:
    """Count what an adapter of DVoRA trains, beside LoRA's and full fine-tuning, from the configuration alone.

    Example: dvora count base --targets query,value --rank 8 --rank 64
    """
    from ..recipes.adapters import counting

    layers = [name for name in targets.replace(" ", "").split(",") if name]
    legend = {"bytes": "of the trained values in float32; a file has some 130 more for each vector or matrix"}
    counts = counting.count(model, layers, rank or (), task_type, lambda_d_groups)
    shown.result(counts, f"What adapters of {model} train", legend)
    shown.next_step("dvora", "train", "--task", "text-classification", "--model", model, "--data", "reviews.csv")
