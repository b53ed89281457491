"""dvora evaluate: how good a run's model is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageError, one_line, wrong_input
from .output import Debug, Download, Json, Output, OwnCode, Quiet
from .train import metric_rows

if TYPE_CHECKING:
    from ..recipes.finished.evaluation import Verdict
    from ..recipes.run_folder import Run

_COLUMNS = "Columns of the files, where they are not those of the training data"


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Files, or image folders, with labels; none: what the run held out.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Also judge the model before training (causal-lm only).")
    ] = False,
    text_column: Annotated[str | None, typer.Option(help="The text.", rich_help_panel=_COLUMNS)] = None,
    second_text_column: Annotated[
        str | None, typer.Option(help="A pair's second text.", rich_help_panel=_COLUMNS)
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="The class or number.", rich_help_panel=_COLUMNS)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the result, as JSON, to this file.")
    ] = None,
    download: Download = False,
    own_code: OwnCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Judge a run's model beside the simplest guess: the commonest class, or the mean.

    Without DATA it is judged on the rows that the run held out for its test,
    which are made again from the same data; if that has changed, say on which
    files. Nothing is written unless --output is given.

    Examples:

    \b
    dvora evaluate dvora-run
    dvora evaluate dvora-run new.csv --label-column verdict
    dvora evaluate runs/play --base --output play.json
    """
    columns = {
        "text_column": text_column,
        "second_text_column": second_text_column,
        "label_column": label_column,
    }
    with one_line(debug), wrong_input():
        if output is not None and not output.absolute().parent.is_dir():
            raise UsageError(f"--output {output}: there is no folder {output.parent}")
        from ..recipes.files import typed, write_atomically
        from ..recipes.finished.evaluation import judge
        from ..recipes.models.hub import Trust
        from ..recipes.run_folder import read_run

        found = read_run(run, Trust(own_code, download))
        result = _shown(found, data or [], judge(found, data or [], columns, base))
        if output is not None:
            write_atomically(typed(output), (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
        Output(as_json, quiet).result(result, title=f"{found.settings.method} on {found.settings.task}")


def _shown(run: "Run", files: list[str], verdict: "Verdict") -> dict[str, Any]:
    return {
        "run": str(run.folder),
        "data": files or "the rows that the run held out",
        "rows": verdict.rows,
        "seen_in_training": verdict.seen,
        "metrics": metric_rows(verdict.metrics),
    }
