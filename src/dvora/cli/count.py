"""`dvora count`: how much an adapter trains."""

from typing import Annotated

import typer

from .errors import one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = "[bold]Examples[/bold]\n\n    dvora count base --targets query,value --rank 8 --rank 64"


def count_command(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub.")],
    targets: Annotated[str, typer.Option(help="Layers to adapt, with commas.", show_default="all linear layers")] = "",
    rank: Annotated[list[int] | None, typer.Option(help="May be given again.", show_default="usual ones")] = None,
    task_type: Annotated[
        str | None, typer.Option(help="SEQ_CLS, CAUSAL_LM ...: with its head.", show_default="as it was saved")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Count what an adapter of DVoRA trains, beside LoRA's and full fine-tuning, from the configuration alone."""
    with one_line(debug):
        from ..recipes.adapters.counting import count

        found = count(model, [name for name in targets.replace(" ", "").split(",") if name], rank or (), task_type)
        legend = {"bytes": "of the trained values in float32; a file has some 130 more for each vector or matrix"}
        shown = Output(as_json, quiet)
        shown.result(found, f"What adapters of {model} train", legend)
        shown.next_step("dvora", "train", "--task", "text-classification", "--model", model, "--data", "reviews.csv")
