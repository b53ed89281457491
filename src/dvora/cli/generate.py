"""dvora generate: texts continued with an adapter, and without it beside them."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ..text import visible
from .errors import UsageError, check_there, one_line, wrong_input
from .output import Debug, Download, Json, Output, OwnCode, Quiet, results

if TYPE_CHECKING:
    from ..recipes.reports.generation import Continuation
    from ..recipes.run_folder import Run
    from ..recipes.settings import Trust

_SAMPLING, _WITHOUT_RUN = "How tokens are chosen", "Without a run"


def generate(
    run: Annotated[
        str | None, typer.Argument(help="The folder of a finished run; left out with --adapter.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="A text to continue; else one a line from --file or stdin.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text file with a prompt a line.")] = None,
    only_adapter: Annotated[bool, typer.Option("--only-adapter", help="Do not generate with the base.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are what the user says in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="The chat's system message.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of a continuation at most.", rich_help_panel=_SAMPLING)
    ] = 64,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest; else sampled, such as 0.8.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from so many of the likeliest.", rich_help_panel=_SAMPLING, show_default="all"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest with this probability together.",
            rich_help_panel=_SAMPLING,
            show_default="all",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what occurred becomes less likely.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, for each prompt.", rich_help_panel=_SAMPLING)] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="The folder of an adapter.", rich_help_panel=_WITHOUT_RUN, show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Its base model.",
            rich_help_panel=_WITHOUT_RUN,
            show_default="the one that the adapter names",
        ),
    ] = None,
    download: Download = False,
    own_code: OwnCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue texts with a trained language model, and beside that with its base.

    One model is loaded; for the base's text its adapter is switched off. The
    likeliest token is taken every time unless a temperature is set; then the
    same seed samples the same tokens. Piped, each continuation is a line of JSON.

    Examples:

    \b
    dvora generate runs/play "the movie"
    dvora generate runs/play "the movie" --temperature 0.8 --seed 1 --max-new-tokens 20
    dvora generate runs/play "was it good?" --chat --only-adapter
    dvora generate --adapter runs/play/adapter --model smollm2 --file prompts.txt --json
    echo "the book" | dvora generate runs/play
    """
    with one_line(debug), wrong_input():
        if adapter is not None and run is not None:
            if prompt is not None:
                raise UsageError(f"both a run ({run}) and --adapter {adapter} are given; give one of them")
            run, prompt = None, run
        if system is not None and not chat:
            raise UsageError("--system is a message of a chat; give --chat too")
        shown = Output(as_json, quiet)
        prompts = _prompts(prompt, file, shown)
        check_there(file, adapter)
        from ..recipes.settings import Trust

        finished = _chosen(run, adapter, model, Trust(own_code, download))
        from ..recipes.reports.generation import Generator, Sampling

        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
        generator = Generator(finished, not only_adapter)
        _print((generator.continued(text, sampling, chat, system) for text in prompts), as_json, results())
        if results().isatty():
            shown.next_step("dvora", "merge", str(run or adapter), "--output", "merged", why="a model without dvora")


def _chosen(run: str | None, adapter: Path | None, model: str | None, trust: "Trust") -> "Run":
    if adapter is not None:
        from ..recipes.models.trained import as_run

        return as_run(adapter, model, trust)
    if model is not None:
        raise UsageError("--model is the base of an --adapter; a run knows its base")
    if run is None:
        raise UsageError("nothing to generate with: give the folder of a run, or --adapter FOLDER")
    from ..recipes.run_folder import read_run

    return read_run(Path(run), trust)


def _prompts(prompt: str | None, file: Path | None, shown: Output) -> Iterator[str]:
    from ..recipes.data.tables import stream_lines, stream_table

    if prompt is not None:
        if file is not None:
            raise UsageError("both a prompt and --file are given; give one of them")
        return iter([prompt])
    if file is not None:
        lines = (row["text"] for _, row in stream_table(file, None, shown.note, suffix=".txt"))
    elif sys.stdin.isatty():
        raise UsageError('there is no prompt; give one, as in: dvora generate RUN "Once upon a time"')
    else:
        lines = (line for _, line in stream_lines(sys.stdin.buffer, "stdin"))
    return filter(str.strip, lines)


def _print(continuations: "Iterable[Continuation]", as_json: bool, stdout: TextIO) -> None:
    from ..recipes.data.written_rows import json_lines, json_object

    if stdout.isatty() and not as_json:
        for continuation in continuations:
            _show(continuation, stdout)
        return
    rows = ({name: text for name, text in asdict(each).items() if text is not None} for each in continuations)
    for text in json_object(rows, "continuations") if as_json else json_lines(rows):
        typer.echo(text.encode(), file=stdout, nl=False)


def _show(continuation: "Continuation", stdout: TextIO) -> None:
    """The prompt, and below it one text, or two beside each other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def lines(text: str) -> Text:
        return Text("\n".join(map(visible, text.expandtabs().split("\n"))))

    columns = {"with the adapter": continuation.with_adapter}
    if continuation.without_adapter is not None:
        columns["without"] = continuation.without_adapter
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, show_header=len(columns) > 1)
    for name in columns:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(lines, columns.values()))
    console = Console(file=stdout, highlight=False)
    console.print(lines(continuation.prompt), style="bold")
    console.print(table)
    console.print()
