"""The program `dvora`: its commands, each in a file of its own."""

import sys
from typing import Annotated

import typer

from .. import __version__
from . import analyze, bank, convert, count, export, inspect, merge
from .doctor import doctor
from .errors import INTERRUPTED, Commands
from .evaluate import evaluate
from .generate import generate
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
app.command("analyze", epilog=analyze.EXAMPLES)(analyze.analyze_command)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect_command)
app.command("count", epilog=count.EXAMPLES)(count.count_command)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge_command)
app.command("export", epilog=export.EXAMPLES)(export.export_command)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert_command)
app.add_typer(bank.app, name="bank")


def main() -> None:
    """Run the program."""
    try:
        app(prog_name="dvora")
    except KeyboardInterrupt:
        # Before a command has begun; commands handle it themselves.
        sys.exit(INTERRUPTED)
