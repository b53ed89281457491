"""`dvora doctor`: is this adapter right?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line, wrong_input
from .output import Debug, Json, Output, Quiet

EXAMPLES = """[bold]Examples[/bold]

    dvora doctor dvora-run

    dvora doctor dvora-run new.csv --rows 16

    dvora doctor adapter --model base --json
"""
MANY = 4


def doctor_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `dvora train`, or of an adapter.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Labelled rows for a run's model; none: those that it held out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base of an adapter; the one that the adapter names.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the batch that the model is asked.")] = 8,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that an adapter is right: LoRA, DoRA, VeRA or DVoRA, from `dvora train` or from anywhere.

    Compares every layer with a dense rebuild in float64, gradients with finite
    differences, the merged model with the adapted one, and the saved file with
    what a fresh process loads of it; looks at values, norms, and what is trained.
    The exit code is 1 if something failed.
    """
    with one_line(debug), wrong_input():
        from ..recipes.examining import examine_folder

        found = examine_folder(folder, model, data or [], rows)
        output = Output(as_json, quiet)
        if as_json:
            output.result({"healthy": found.healthy, "findings": [asdict(finding) for finding in found.findings]})
        else:
            output.result(
                {"findings": [{"": f.status, "check": f.check, "found": f.told} for f in found.findings]},
                f"Doctor's findings on {folder}",
            )
            for finding in found.findings:
                if finding.advice:
                    typer.echo(f"\n{finding.status} {finding.check}: {finding.advice}")
                    if finding.layers:
                        more = f" and {len(finding.layers) - MANY} more" if len(finding.layers) > MANY else ""
                        typer.echo(f"  in {', '.join(finding.layers[:MANY])}{more}")
    if any(finding.status == "fail" for finding in found.findings):
        raise typer.Exit(1)
