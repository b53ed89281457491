"""`dvora predict`: what a run's model predicts for rows without labels."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..recipes.models.hub import check_model
from ..recipes.settings import Trust
from ..text import shown as as_text
from ..text import visible
from .errors import check_there, check_writable
from .options import AbstainBelow, ARun, Download, OwnCode, SecondTextColumn, TextColumn, command
from .output import Output, print_rows, print_text, results

if TYPE_CHECKING:
    from ..recipes.reports.prediction import Predicted

STREAM = "-"
ROWS = ""
"""All of them, where classes are counted; no class has this name."""


@command
def predict(
    run: ARun,
    shown: Output,
    file: Annotated[
        str,
        typer.Argument(help="csv, tsv, jsonl, json, parquet, txt with a text a line, images; -: lines from stdin."),
    ] = STREAM,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A csv, tsv or jsonl file; -: stdout, as JSON lines or to be read.")
    ] = STREAM,
    all_probabilities: Annotated[
        bool, typer.Option("--all-probabilities", help="A column with the probability of every class.")
    ] = False,
    abstain_below: AbstainBelow = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model sees at once.")] = 32,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    safe_csv: Annotated[
        bool,
        typer.Option(
            "--safe-csv", help="In a csv or tsv, an apostrophe before text that a spreadsheet would run as a formula."
        ),
    ] = False,
    download: Download = False,
    own_code: OwnCode = False,
) -> None:
    """Predict the class (with its probability) or the number of every row, in the rows' order.

    Rows keep their columns, a label among them or not, and get `prediction` and
    `probability`. Lines hold a text, two texts with a tab between them, or the
    path of an image, by the run's task; empty lines are passed over. Long inputs
    take no more memory than short ones (but .json, which is read whole). An
    output file appears when it is complete. Cells are written as they were read: if
    others wrote them, give --safe-csv before you open the file in a spreadsheet.
    With --abstain-below rows that are less sure have no prediction; `abstained` says so.

    Examples:

    \b
    dvora predict dvora-run new.csv -o predicted.csv
    dvora predict dvora-run new.csv --all-probabilities
    echo "a fine movie" | dvora predict dvora-run
    cat lines.txt | dvora predict dvora-run - -o predicted.jsonl
    """
    from ..recipes.data.writers import writer_for

    if output != STREAM:
        write = writer_for(Path(output).suffix, safe_csv)
        check_writable(Path(output))
    elif safe_csv:
        raise ValueError("--safe-csv is for a csv or tsv file; name one with --output")
    check_there(None if file == STREAM else file)
    from ..recipes.run_folder import read_run

    finished = read_run(run, Trust(own_code, download))
    check_model(finished.settings.model, finished.trust)
    from ..recipes.data.examples import file_inputs, line_inputs, reading_settings
    from ..recipes.data.tables import stream_lines
    from ..recipes.files import typed
    from ..recipes.reports.prediction import Predictor
    from ..whole_files import new_file

    predictor = Predictor(finished)
    settings = reading_settings(finished, {"text_column": text_column, "second_text_column": second_text_column})
    if file == STREAM:
        inputs = line_inputs(stream_lines(sys.stdin.buffer, "stdin"), settings)
    else:
        inputs = file_inputs(Path(file), settings, shown.note)
    # Whoever types lines wants an answer to each.
    size = 1 if file == STREAM and sys.stdin.isatty() else batch_size
    predicted = predictor.predict(inputs, size, all_probabilities, abstain_below)
    counts: Counter[str | None] = Counter()
    if output != STREAM:
        with new_file(typed(Path(output))) as opened:
            for text in write(row.row for row in _counted(predicted, counts, finished.labels)):
                opened.write(text.encode())
    elif results().isatty() and not shown.as_json:
        print_text(_table(predicted, finished.labels, shutil.get_terminal_size().columns))
    else:
        print_rows((row.row for row in predicted), "predictions" if shown.as_json else None)
    if cut := predictor.truncation.sentence(predictor.length):
        shown.note(cut)
    if output != STREAM:
        summary: dict[str, Any] = {"output": output, "rows": counts.pop(ROWS, 0)}
        if abstain_below is not None:
            summary["abstained"] = counts.pop(None, 0)
        if finished.labels:
            summary["predicted"] = dict(counts.most_common())
        if shown.as_json:
            summary["truncation"] = asdict(predictor.truncation)
        shown.result(summary, title=f"Predictions of {run}")
        shown.next_step("dvora", "report", str(run), why="a page on how good they are")


def _counted(
    predicted: "Iterable[Predicted]", counts: Counter[str | None], labels: tuple[str, ...]
) -> "Iterator[Predicted]":
    for row in predicted:
        prediction = row.columns["prediction"]
        counts.update(
            [one["label"] for one in prediction] if isinstance(prediction, list) else [prediction][: len(labels)]
        )
        counts[ROWS] += 1
        yield row


def _table(predicted: "Iterable[Predicted]", labels: tuple[str, ...], width: int) -> Iterator[str]:
    """Lines to be read, each as soon as it is known: the prediction, then as much of the row as has room."""
    first = max(len("prediction"), *(len(visible(label)) for label in labels), 0)
    for number, row in enumerate(predicted):
        rest = {name: value for name, value in row.columns.items() if name != "prediction"}
        if not number:
            yield visible("  ".join(["prediction".ljust(first), *rest, *row.input.row]))[:width] + "\n"
        numbers = [
            (f"{value:.3f}" if isinstance(value, float) else as_text(value)).rjust(len(name))
            for name, value in rest.items()
        ]
        texts = [" ".join(str(value).split()) for value in row.input.row.values()]
        cells = [as_text(row.columns["prediction"]).ljust(first), *numbers, visible(" | ".join(texts)[:width])]
        yield "  ".join(cells)[:width] + "\n"
