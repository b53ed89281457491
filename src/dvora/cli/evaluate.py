"""`dvora evaluate`: how good a run's model is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.models.hub import check_model
from ..recipes.settings import Trust
from .errors import check_there, check_writable
from .options import AbstainBelow, ARun, Download, LabelColumn, OwnCode, SecondTextColumn, TextColumn, command
from .output import Output


@command
def evaluate(
    run: ARun,
    shown: Output,
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Files, or image folders, with labels.", show_default="the rows that the run held out"),
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base", help="Also evaluate the base: a language model before training, else the head alone."),
    ] = False,
    abstain_below: AbstainBelow = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the result, as JSON, to this file.")
    ] = None,
    download: Download = False,
    own_code: OwnCode = False,
) -> None:
    """Evaluate a run's model beside the simplest guess: the commonest class, or the mean.

    Without DATA it is evaluated on the rows that the run held out for its test,
    which are drawn again from the same data; if that has changed, give files.
    Nothing is written unless --output is given. With --abstain-below the metrics have
    the share of rows that are answered (coverage) and the accuracy on these.

    Examples:

    \b
    dvora evaluate dvora-run
    dvora evaluate dvora-run new.csv --label-column verdict
    dvora evaluate runs/play --base --output play.json
    """
    columns = {"text_column": text_column, "second_text_column": second_text_column, "label_column": label_column}
    if output is not None:
        check_writable(output)
    check_there(*data or ())
    from ..recipes.run_folder import read_run

    finished = read_run(run, Trust(own_code, download))
    check_model(finished.settings.model, finished.trust)
    # After all that can be wrong without them: libraries of models take seconds.
    from ..recipes.files import typed
    from ..recipes.reports.evaluation import evaluate_run
    from ..recipes.tasks.metrics import metric_rows
    from ..recipes.tasks.verdict import verdict
    from ..whole_files import write_atomically

    evaluation = evaluate_run(finished, data or [], columns, base, shown.note, abstain_below)
    sentences = verdict(evaluation.metrics, evaluation.comparisons)
    result: dict[str, Any] = {
        "run": str(finished.folder),
        "data": data or "the rows that the run held out",
        "rows": evaluation.rows,
        "seen_in_training": evaluation.seen,
    }
    if shown.as_json:
        result["truncation"] = asdict(evaluation.truncation)
    elif cut := evaluation.truncation.sentence(evaluation.max_length):
        result["cut"] = cut
    result["metrics"] = metric_rows(evaluation.metrics)
    if evaluation.limits:
        result["abstaining_below"] = evaluation.limits
    if shown.as_json:
        result |= {"comparisons": evaluation.comparisons, "verdict": sentences}
    if output is not None:
        write_atomically(typed(output), (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    task = finished.settings.task
    shown.result(result, title=f"{finished.settings.method} on {task}", verdict="\n".join(sentences))
    if task == "causal-lm":
        shown.next_step("dvora", "generate", str(run), "Once upon a time")
    else:
        shown.next_step("dvora", "predict", str(run), "new.csv", "--output", "predicted.csv")
