"""`dvora doctor`: is this adapter right?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.settings import Trust
from ..text import listed
from .errors import check_there
from .options import Download, OwnCode, command
from .output import Output

MANY = 4


@command
def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `dvora train`, or of an adapter.")],
    shown: Output,
    data: Annotated[
        list[str] | None, typer.Argument(help="Labelled rows for a run's model.", show_default="those that it held out")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model of an adapter.", show_default="the one that the adapter names")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the batch that the checks use.")] = 8,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers to check one by one, spread over the model.", show_default="all"),
    ] = None,
    download: Download = False,
    own_code: OwnCode = False,
) -> None:
    """Prove that an adapter is right: LoRA, DoRA, VeRA or DVoRA, from `dvora train` or from anywhere.

    Compares outputs and gradients of every layer with a dense rebuild in float64,
    the merged model with the adapted one, and the saved file with what a fresh
    process loads of it; checks values, norms, and what is trained.
    The exit code is 1 if something failed.

    Examples:

    \b
    dvora doctor dvora-run
    dvora doctor dvora-run new.csv --rows 16
    dvora doctor adapter --model base --json
    """
    check_there(folder)
    from ..recipes.reports.examination import examine_folder

    examination = examine_folder(folder, model, data or [], rows, layers, Trust(own_code, download))
    values: dict[str, Any] = {
        "healthy": examination.healthy,
        "verdict": examination.verdict,
        **asdict(examination),
    }
    if not shown.as_json:
        values = {
            "layers_looked_at": f"{examination.looked_at} of {examination.layers}",
            "findings": examination.rows(),
        }
        if advice := [finding for finding in examination.findings if finding.advice]:
            values["what_to_do"] = [
                {"check": finding.check, "advice": finding.advice, "where": listed(finding.layers, MANY)}
                for finding in advice
            ]
    shown.result(values, f"Doctor's findings on {folder}", verdict=f"Verdict: {examination.verdict}")
    if examination.failed:
        raise typer.Exit(1)
    shown.next_step("dvora", "merge", str(folder), "--output", "merged", why="a model without dvora")
