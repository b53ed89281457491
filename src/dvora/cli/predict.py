"""dvora predict: what a run's model predicts for rows without labels."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..text import shown as as_text
from ..text import visible
from .errors import UsageError, check_there, check_writable, one_line, wrong_input
from .output import Debug, Download, Json, Output, OwnCode, Quiet, SecondTextColumn, TextColumn, results

if TYPE_CHECKING:
    from ..recipes.reports.prediction import Predicted

STREAM = "-"


def predict(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
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
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict the class (with its probability) or the number of every row, in the rows' order.

    Rows keep their columns, a label among them or not, and get `prediction` and
    `probability`. Lines hold a text, two texts with a tab between them, or the
    path of an image, by the run's task; empty lines are passed over. Long inputs
    take no more memory than short ones (but .json, which is read whole). An
    output file appears when it is complete. Cells are written as they were read: if
    others wrote them, give --safe-csv before you open the file in a spreadsheet.

    Examples:

    \b
    dvora predict dvora-run new.csv -o predicted.csv
    dvora predict dvora-run new.csv --all-probabilities
    echo "a fine movie" | dvora predict dvora-run
    cat lines.txt | dvora predict dvora-run - -o predicted.jsonl
    """
    with one_line(debug), wrong_input():
        _check_output(output, safe_csv)
        shown, summary = Output(as_json, quiet), None
        columns = {"text_column": text_column, "second_text_column": second_text_column}
        check_there(None if file == STREAM else file)
        from ..recipes.run_folder import read_run
        from ..recipes.settings import Trust

        finished = read_run(run, Trust(own_code, download))
        from ..recipes.data.new_files import file_inputs, line_inputs, reading_settings
        from ..recipes.data.tables import stream_lines
        from ..recipes.reports.prediction import Predictor

        predictor = Predictor(finished)
        # Whoever types lines wants an answer to each.
        size = 1 if file == STREAM and sys.stdin.isatty() else batch_size
        settings = reading_settings(finished, columns)
        if file == STREAM:
            inputs = line_inputs(stream_lines(sys.stdin.buffer, "stdin"), settings)
        else:
            inputs = file_inputs(Path(file), settings, shown.note)
        predicted = predictor.predict(inputs, size, all_probabilities)
        if output == STREAM:
            _print(predicted, finished.labels, as_json, results())
        else:
            summary = _write(predicted, Path(output), safe_csv)
        if cut := predictor.truncation.sentence(predictor.length):
            shown.note(cut)
        if summary is not None:
            truncation = asdict(predictor.truncation)
            shown.result(summary | ({"truncation": truncation} if as_json else {}), title=f"Predictions of {run}")
            shown.next_step("dvora", "report", str(run), why="a page on how good they are")


def _check_output(output: str, safe: bool) -> None:
    from ..recipes.data.written_rows import writer_for

    if output != STREAM:
        writer_for(Path(output).suffix, safe)
        check_writable(Path(output))
    elif safe:
        raise UsageError("--safe-csv is for a csv or tsv file; name one with --output")


def _write(predicted: "Iterable[Predicted]", path: Path, safe: bool) -> dict[str, Any]:
    """Write a file of predictions; returns how many there are of what."""
    from ..recipes.data.written_rows import writer_for
    from ..recipes.files import typed
    from ..whole_files import new_file

    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in predicted:
            prediction = row.columns["prediction"]
            counts[prediction if isinstance(prediction, str) else ""] += 1
            yield row.row

    with new_file(typed(path)) as file:
        for text in writer_for(path.suffix, safe)(counted()):
            file.write(text.encode())
    classes = {} if "" in counts else {"predicted": dict(counts.most_common())}
    return {"output": str(path), "rows": counts.total(), **classes}


def _print(predicted: "Iterable[Predicted]", labels: tuple[str, ...], as_json: bool, stdout: TextIO) -> None:
    from ..recipes.data.written_rows import json_lines, json_object

    if stdout.isatty() and not as_json:
        texts = _table(predicted, labels, shutil.get_terminal_size().columns)
    else:
        rows = (row.row for row in predicted)
        texts = json_object(rows, "predictions") if as_json else json_lines(rows)
    for text in texts:
        typer.echo(text.encode(), file=stdout, nl=False)


def _table(predicted: "Iterable[Predicted]", labels: tuple[str, ...], width: int) -> Iterator[str]:
    """Lines to be read, each as soon as it is known: the prediction, then as much of the row as has room."""
    first = max(len("prediction"), *(len(visible(label)) for label in labels), 0)
    for number, row in enumerate(predicted):
        rest = {name: value for name, value in row.columns.items() if name != "prediction"}
        if not number:
            yield visible("  ".join(["prediction".ljust(first), *rest, *row.input.row]))[:width] + "\n"
        prediction = row.columns["prediction"]
        numbers = [f"{value:.3f}".rjust(len(name)) for name, value in rest.items()]
        texts = [" ".join(str(value).split()) for value in row.input.row.values()]
        cells = [as_text(prediction).ljust(first), *numbers, visible(" | ".join(texts)[:width])]
        yield "  ".join(cells)[:width] + "\n"
