"""`dvora generate`: texts continued with an adapter, and without it beside them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..recipes.files import checked
from ..recipes.settings import Sampling, Trust
from ..text import visible
from .errors import check_there
from .options import Download, OwnCode, command, with_options_of
from .output import Output, print_rows, results

if TYPE_CHECKING:
    from ..recipes.reports.generation import Continuation
    from ..recipes.run_folder import Run

_WITHOUT_RUN = "Without a run"


@command
@with_options_of(Sampling)
def generate(
    shown: Output,
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
    **sampling: Any,
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
    if adapter is not None and run is not None:
        if prompt is not None:
            raise ValueError(f"both a run ({run}) and --adapter {adapter} are given; give one of them")
        run, prompt = None, run
    if system is not None and not chat:
        raise ValueError("--system is a message of a chat; give --chat too")
    prompts = _prompts(prompt, file, shown)
    check_there(file, adapter)
    chosen = _model(run, adapter, model, Trust(own_code, download))
    drawn = checked(Sampling, {name: value for name, value in sampling.items() if value is not None})
    from ..recipes.reports.generation import Generator

    generator = Generator(chosen, not only_adapter)
    continuations = (generator.continued(text, drawn, chat, system) for text in prompts)
    if results().isatty() and not shown.as_json:
        for continuation in continuations:
            _show(continuation, results())
    else:
        print_rows((continuation.row for continuation in continuations), "continuations" if shown.as_json else None)
    if results().isatty():
        shown.next_step("dvora", "merge", str(run or adapter), "--output", "merged", why="a model without dvora")


def _model(run: str | None, adapter: Path | None, model: str | None, trust: Trust) -> "Run":
    if adapter is not None:
        from ..recipes.reports.run_model import as_run

        return as_run(adapter, model, trust)
    if model is not None:
        raise ValueError("--model is the base of an --adapter; a run knows its base")
    if run is None:
        raise ValueError("nothing to generate with: give the folder of a run, or --adapter FOLDER")
    from ..recipes.run_folder import read_run

    return read_run(Path(run), trust)


def _prompts(prompt: str | None, file: Path | None, shown: Output) -> Iterator[str]:
    from ..recipes.data.tables import stream_lines, stream_table

    if prompt is not None:
        if file is not None:
            raise ValueError("both a prompt and --file are given; give one of them")
        return iter([prompt])
    if file is not None:
        lines = (row["text"] for _, row in stream_table(file, None, shown.note, suffix=".txt"))
    elif sys.stdin.isatty():
        raise ValueError('there is no prompt; give one, as in: dvora generate RUN "Once upon a time"')
    else:
        lines = (line for _, line in stream_lines(sys.stdin.buffer, "stdin"))
    return filter(str.strip, lines)


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
