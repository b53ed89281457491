"""What a command shows: results on stdout, as tables or JSON; notes, progress and what libraries print on stderr."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer

from ..tools.pages.text import shown, visible

_BASE = "The base model"
Json = Annotated[bool, typer.Option("--json", help="One JSON object in place of tables.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.", rich_help_panel="Output")]
Download = Annotated[
    bool,
    typer.Option("--download", help="Fetch a base that only a file names from the hub.", rich_help_panel=_BASE),
]
OwnCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the base, if it has any.", rich_help_panel=_BASE
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]

LONGEST = 2000
"""Letters of a message: errors repeat what is in files, whatever its length."""
_kept: ContextVar[TextIO | None] = ContextVar("kept", default=None)


class Output:
    """Where a command's results and notes go.

    Args:
        as_json: results as JSON.
        quiet: no notes and no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        # Piped into a program nobody reads notes.
        self.talks = not quiet and sys.stderr.isatty()

    def result(self, values: Mapping[str, Any], title: str = "") -> None:
        """Show named values, among them lists of rows (each a mapping with the same keys) as tables of their own."""
        if self.as_json:
            typer.echo(json.dumps(values, default=str), file=results())
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=results(), highlight=False)
        if title:
            console.print(Text(visible(title), style="bold"))
        single = {name: value for name, value in values.items() if not _is_rows(value)}
        if single:
            console.print(_table([{"": name, " ": value} for name, value in single.items()], headed=False))
        for name, rows in values.items():
            if _is_rows(rows):
                console.print()
                console.print(Text(visible(name.replace("_", " ")), style="bold"))
                console.print(_table(rows))

    def note(self, text: str) -> None:
        """Tell something on stderr, if somebody watches."""
        if self.talks:
            tell(text)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(rows: Sequence[Mapping[str, Any]], headed: bool = True) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=headed, box=None, pad_edge=False)
    for column in rows[0]:
        numbers = all(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(
            Text(visible(column.replace("_", " "))), justify="right" if numbers else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(shown(row.get(column))) for column in rows[0]))
    return table


@contextmanager
def kept_stdout() -> Iterator[TextIO]:
    """Send what is printed to stderr, and give the stream for results."""
    kept = _kept.get()
    if kept is not None:
        yield kept
        return
    token = _kept.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield results()
    finally:
        _kept.reset(token)


def tell(text: str) -> None:
    """Say something on stderr, in one line in which nothing of a file does anything to the terminal."""
    shown = visible(text)
    typer.echo(shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}...", err=True)


def results() -> TextIO:
    """The stream for results: stdout, also while it is kept."""
    return _kept.get() or sys.stdout
