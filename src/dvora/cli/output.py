"""What a command shows: results on stdout, as tables or JSON; notes, progress and what libraries print on stderr."""

import json
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

import typer

from ..text import shown, visible

LONGEST = 2000
"""Letters of a message; errors repeat what is in files, which may be long."""
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


class Output:
    """Where a command's results and notes go.

    Args:
        as_json: results as JSON.
        quiet: no notes and no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(
        self, values: Mapping[str, Any], title: str = "", legend: Mapping[str, str] | None = None, verdict: str = ""
    ) -> None:
        """Show named values, among them lists of rows (each a mapping with the same keys) as tables of their own.

        Args:
            values: by name.
            title: above tables.
            legend: what columns mean, below the tables.
            verdict: what it all comes to, at the end; lines.
        """
        if self.as_json:
            typer.echo(json.dumps(values, default=str), file=results())
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=results(), highlight=False)

        def print_bold(line: str) -> None:
            console.print(Text(visible(line), style="bold"))

        def print_pairs(pairs: Mapping[str, Any]) -> None:
            _print_table(console, [{"": spaced(name), " ": value} for name, value in pairs.items()], headed=False)

        if title:
            print_bold(title)
        tables = {name: value for name, value in values.items() if _is_rows(value)}
        if single := {name: value for name, value in values.items() if name not in tables}:
            print_pairs(single)
        for name, rows in tables.items():
            console.print()
            print_bold(spaced(name))
            _print_table(console, rows)
        if legend:
            console.print()
            print_pairs(legend)
        if verdict:
            console.print()
            for line in verdict.splitlines():
                print_bold(line)

    def note(self, text: str) -> None:
        """Say something on stderr."""
        if not self.quiet:
            print_line(text)

    def next_step(self, *command: str, why: str = "") -> None:
        """Name the command that most people type after this one."""
        if not self.as_json:
            self.note(f"Next: {shlex.join(command)}" + f"  ({why})" * bool(why))


def spaced(name: str) -> str:
    """A name with spaces in place of underscores."""
    return name.replace("_", " ")


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _print_table(console: Any, rows: Sequence[Mapping[str, Any]], headed: bool = True) -> None:
    """A table in which sentences fold; names and numbers stay whole, if need be beyond the edge of the terminal."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=headed, box=None, pad_edge=False)
    for column in rows[0]:
        cells = [shown(row.get(column)) for row in rows]
        header = Text(visible(spaced(column)))
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        is_name = not any(" " in cell for cell in cells)
        table.add_column(
            header,
            justify="right" if numbers else "left",
            overflow="fold",
            min_width=max(header.cell_len, *map(cell_len, cells)) if is_name else None,
        )
    for row in rows:
        table.add_row(*(Text(shown(row.get(column))) for column in rows[0]))
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    if needed > console.width:
        console = Console(file=console.file, highlight=False, width=needed)
    console.print(table)


@contextmanager
def results_alone() -> Iterator[None]:
    """Keep stdout for results: what is printed goes to stderr."""
    token = _results.set(results())
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


WITH_HANDLERS = ("DeepSpeed", "torch.utils._pytree")
"""Loggers that say such things, with handlers of their own or of loggers above them."""


class _Unshown(logging.Handler):
    """Shows what no other handler does: our own warnings, and errors of everybody."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        while logger.parent is not None:
            if logger.handlers:
                return
            logger = logger.parent
        if record.levelno >= logging.ERROR or record.name.startswith("dvora"):
            print_line(record.getMessage())


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Keep warnings of packages from the terminal: at their import some say what they lack, whoever needs it."""
    handler, root, others = _Unshown(logging.WARNING), logging.getLogger(), [*map(logging.getLogger, WITH_HANDLERS)]
    root.addHandler(handler)
    for logger in others:
        logger.addFilter(_is_error)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger in others:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def print_rows(rows: Iterable[Mapping[str, Any]], name: str | None) -> None:
    """Print rows as lines of JSON, each as soon as it is known, or as one object with a list of that name."""
    from ..recipes.data.writers import json_lines, json_object

    print_text(json_lines(rows) if name is None else json_object(rows, name))


def print_text(texts: Iterable[str]) -> None:
    """Print results in UTF-8, whatever the terminal's encoding."""
    for text in texts:
        typer.echo(text.encode(), file=results(), nl=False)


def print_line(text: str) -> None:
    """One line on stderr, in which no text from a file acts on the terminal."""
    shown = visible(text)
    typer.echo(shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}...", err=True)


def results() -> TextIO:
    """The stream for results: stdout, also while what is printed goes elsewhere."""
    return _results.get() or sys.stdout
