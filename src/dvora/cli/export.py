"""`dvora export`: a base model with adapters that switch, for runtimes without PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.adapters import Runtime
from .errors import check_there
from .options import NewFolder, command
from .output import Output


@command
def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of an adapter, of a run of `dvora train`, or of several of these.")
    ],
    output: NewFolder,
    to: Annotated[
        Runtime,
        typer.Option(
            help="onnx: graphs for onnxruntime; web: the same with a page. For llama.cpp (gguf) `dvora merge` and its "
            "converter; as LoRA there is no export."
        ),
    ],
    shown: Output,
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the first adapter names")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Compared with PyTorch, beside two sentences; may be given again.", show_default="none"),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="A graph with int8 weights of the base too.")] = False,
) -> None:
    """Write a base model once, as a graph to which an adapter is handed as a vector.

    The folder appears whole, and only if every graph gives the adapted model's outputs.

    Examples:

    \b
    dvora export run --to onnx --output exported
    dvora export customers --model minilm --to web --output site
    """
    check_there(source)
    from ..recipes.adapters import exporting

    values = exporting.export(source, output, to, model, text or (), int8, shown.note)
    shown.result(values, f"Exported to {output}")
