"""`dvora doctor`: is this adapter right?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text import listed
from .errors import check_there, one_line, wrong_input
from .output import Debug, Download, Json, Output, OwnCode, Quiet

if TYPE_CHECKING:
    from ..tools.doctor import Examination

MANY = 4


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `dvora train`, or of an adapter.")],
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
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
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
    with one_line(debug), wrong_input():
        check_there(folder)
        from ..recipes.reports.examination import examine_folder
        from ..recipes.settings import Trust

        examination = examine_folder(folder, model, data or [], rows, layers, Trust(own_code, download))
        shown = Output(as_json, quiet)
        values = {"healthy": examination.healthy, "verdict": examination.verdict, **asdict(examination)}
        shown.result(
            values if as_json else _tables(examination),
            f"Doctor's findings on {folder}",
            verdict=f"Verdict: {examination.verdict}",
        )
        if examination.failed:
            raise typer.Exit(1)
        shown.next_step("dvora", "merge", str(folder), "--output", "merged", why="a model without dvora")


def _tables(examination: "Examination") -> dict[str, Any]:
    advice = [
        {"check": finding.check, "advice": finding.advice, "where": listed(finding.layers, MANY)}
        for finding in examination.findings
        if finding.advice
    ]
    looked_at = f"{examination.looked_at} of {examination.layers}"
    return {"layers_looked_at": looked_at, "findings": examination.rows()} | ({"what_to_do": advice} if advice else {})
