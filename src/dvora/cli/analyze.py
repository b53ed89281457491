"""`dvora analyze`: what did training change?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import check_page, check_there
from .options import command
from .output import Output

LEGEND = {
    "magnitude, %": "mean change of the norm of a row of a weight",
    "growth, %": "the same with its sign: above zero, rows got longer",
    "angle, degrees": "mean angle between a row before and after",
    "size, %": "norm of the update as a share of the weight's",
}


@command
def analyze(
    folders: Annotated[
        list[Path], typer.Argument(help="Adapters or runs; or one folder with the checkpoints of a trainer.")
    ],
    shown: Output,
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the first adapter names")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; the numbers go beside it, as JSON.", show_default="analysis.html"
        ),
    ] = None,
) -> None:
    """Show what training changed: magnitude, direction and spectrum of every layer, similarity, drift.

    Writes one self-contained HTML page and a JSON file of the same name. Works on
    adapters of LoRA, DoRA, VeRA and DVoRA.

    Examples:

    \b
    dvora analyze dvora-run
    dvora analyze adapter other-adapter --model base --output compared.html
    dvora analyze trainer-output --model base --json
    """
    page = output or Path("analysis.html")
    check_page(page)
    check_there(*folders)
    from ..recipes.adapters.analyzing import analyze_folders, write_report
    from ..recipes.files import typed
    from ..tools.analysis.measures import means

    analysis, steps = analyze_folders(folders, model)
    what = folders[0].resolve().name if len(folders) == 1 else f"{len(folders)} adapters"
    figures = write_report(analysis, steps, what, page if output is None else typed(output))
    rows: list[dict[str, Any]] = [
        {"adapter": name, "layers": len(changes), **means([layer.change for layer in changes])}
        for name, changes in zip(analysis.adapters, analysis.changes, strict=True)
    ]
    shown.result({"report": str(page), "figures": str(figures), "adapters": rows}, legend=LEGEND)
    shown.next_step("dvora", "doctor", str(folders[0]), why="open the page in a browser; this checks the adapter")
