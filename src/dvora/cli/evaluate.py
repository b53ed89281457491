"""dvora evaluate: how good a run's model is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import check_there, check_writable, one_line, wrong_input
from .output import Debug, Download, Json, LabelColumn, Output, OwnCode, Quiet, SecondTextColumn, TextColumn

if TYPE_CHECKING:
    from ..recipes.reports.evaluation import Evaluation
    from ..recipes.run_folder import Run


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Files, or image folders, with labels.", show_default="the rows that the run held out"),
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base", help="Also evaluate the base: a language model before training, else the head alone."),
    ] = False,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the result, as JSON, to this file.")
    ] = None,
    download: Download = False,
    own_code: OwnCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate a run's model beside the simplest guess: the commonest class, or the mean.

    Without DATA it is evaluated on the rows that the run held out for its test,
    which are drawn again from the same data; if that has changed, give files.
    Nothing is written unless --output is given.

    Examples:

    \b
    dvora evaluate dvora-run
    dvora evaluate dvora-run new.csv --label-column verdict
    dvora evaluate runs/play --base --output play.json
    """
    columns = {"text_column": text_column, "second_text_column": second_text_column, "label_column": label_column}
    with one_line(debug), wrong_input():
        if output is not None:
            check_writable(output)
        check_there(*data or ())
        from ..recipes.run_folder import read_run
        from ..recipes.settings import Trust

        finished = read_run(run, Trust(own_code, download))
        # After all that can be wrong without them: libraries of models take seconds.
        from ..recipes.files import typed
        from ..recipes.reports.evaluation import evaluate_run
        from ..recipes.tasks.verdict import verdict
        from ..whole_files import write_atomically

        shown = Output(as_json, quiet)
        evaluation = evaluate_run(finished, data or [], columns, base, shown.note)
        sentences = verdict(evaluation.metrics, {evaluation.part: evaluation.rows})
        result = _shown(finished, data or [], evaluation, as_json) | ({"verdict": sentences} if as_json else {})
        if output is not None:
            write_atomically(typed(output), (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
        title = f"{finished.settings.method} on {finished.settings.task}"
        shown.result(result, title=title, verdict="\n".join(sentences))
        if finished.settings.task == "causal-lm":
            shown.next_step("dvora", "generate", str(run), "Once upon a time")
        else:
            shown.next_step("dvora", "predict", str(run), "new.csv", "--output", "predicted.csv")


def _shown(run: "Run", files: list[str], evaluation: "Evaluation", as_json: bool) -> dict[str, Any]:
    from ..recipes.tasks.metrics import metric_rows

    cut = evaluation.truncation.sentence(evaluation.max_length)
    return {
        "run": str(run.folder),
        "data": files or "the rows that the run held out",
        "rows": evaluation.rows,
        "seen_in_training": evaluation.seen,
        **({"truncation": asdict(evaluation.truncation)} if as_json else {"cut": cut} if cut else {}),
        "metrics": metric_rows(evaluation.metrics),
    }
