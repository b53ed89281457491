"""`dvora count`: what each method would train."""

from typing import Annotated

import typer

from .errors import one_line
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora count base

    dvora count base --targets query,value --rank 8 --rank 64

    dvora count base --task-type SEQ_CLS --labels 5
"""


def count_command(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub.")],
    targets: Annotated[
        str, typer.Option(help="Names of the layers to adapt, with commas.", show_default="all linear layers")
    ] = "",
    rank: Annotated[
        list[int] | None,
        typer.Option(help="A rank to count with; may be given again.", show_default="usual ones for each method"),
    ] = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            help="SEQ_CLS, TOKEN_CLS, CAUSAL_LM, IMAGE_CLS ...: adds the head of that task.",
            show_default="the model as it was saved",
        ),
    ] = None,
    labels: Annotated[int | None, typer.Option(help="Outputs of the head.", show_default="the model's", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Count what dvora, vera, lora, dora, a head alone and full fine-tuning train: parameters and bytes.

    From the model's configuration alone: no weights are downloaded or read.
    """
    with one_line(debug):
        from ..recipes.adapters.counting import count

        names = [name for name in targets.replace(" ", "").split(",") if name]
        shown = Output(as_json, quiet)
        shown.result(count(model, names, rank or (), task_type, labels), f"What methods train of {model}")
        shown.next_step("dvora", "train", "--task", "text-classification", "--model", model, "--data", "reviews.csv")
