"""The program `dvora`: its commands, each in a file of its own."""

import sys
from typing import Annotated

import typer

from .. import __version__
from . import bank
from .analyze import analyze
from .convert import convert
from .count import count
from .doctor import doctor
from .errors import INTERRUPTED, Commands
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .merge import merge
from .predict import predict
from .report import report
from .serve import serve
from .train import train

app = typer.Typer(
    name="dvora",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune models with adapters of kilobytes: from a table or a text to a merged model.",
    epilog="Exit codes: 0 fine, 1 the work failed, 2 wrong use, 130 stopped by Ctrl-C.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dvora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


for command in (train, evaluate, predict, generate, doctor, report, serve):
    app.command()(command)
for command in (analyze, inspect, count, merge, export, convert):
    app.command()(command)
app.add_typer(bank.app, name="bank")


def main() -> None:
    """Run the program."""
    try:
        app(prog_name="dvora")
    except KeyboardInterrupt:
        # Before a command has begun; commands handle it themselves.
        sys.exit(INTERRUPTED)
