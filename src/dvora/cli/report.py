"""`dvora report`: a page to look at."""

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.settings import Trust
from .errors import check_page, check_there
from .options import ARun, Download, OwnCode, command
from .output import Output


@command
def report(
    run: ARun,
    shown: Output,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page.", show_default="RUN.html")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run to compare with.", show_default="the head alone on the frozen base")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows to predict for at most.")] = 500,
    doctor: Annotated[bool, typer.Option(help="Examine the adapter too.")] = True,
    download: Download = False,
    own_code: OwnCode = False,
) -> None:
    """Write a page on a run: what was trained, curves, what the adapter changed, sizes, and the doctor's table.

    One HTML file that needs nothing else: no server, no scripts, no network.

    Examples:

    \b
    dvora report dvora-run
    dvora report dvora-run --against head-run --output compared.html
    """
    page = output or Path(f"{run.resolve().name}.html")
    check_page(page)
    check_there(run)
    from ..recipes.files import typed
    from ..recipes.reports.run_page import write_page

    write_page(run, page if output is None else typed(output), against, rows, doctor, Trust(own_code, download))
    shown.result({"report": str(page), "bytes": page.stat().st_size})
    shown.next_step("dvora", "merge", str(run), "--output", "merged", why="once you have looked at the page")
