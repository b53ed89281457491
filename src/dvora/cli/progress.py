"""How training shows where it is: a bar on a terminal, else a line for each evaluation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..tools.pages.text import visible
from .output import tell

if TYPE_CHECKING:
    from ..recipes.training.watching import Progress, Tell


@contextmanager
def shown_progress(quiet: bool) -> "Iterator[Tell | None]":
    """What to tell progress to; None when nothing is to be shown."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _tell_evaluations
    else:
        with _bar() as bar:
            task = bar.add_task("", total=None, told="")
            yield lambda progress: _update(bar, task, progress)


def _tell_evaluations(progress: "Progress") -> None:
    if progress.metrics is not None:
        tell(evaluation_line(progress))


def evaluation_line(progress: "Progress") -> str:
    """An evaluation in one line."""
    metrics = progress.metrics or {}
    kept = {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "tokens"))}
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in kept.items())
    return f"step {progress.step} of {progress.steps}: {told}{'  (best so far)' if progress.is_best else ''}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}", markup=False))
    return Bar(*columns, console=Console(stderr=True, highlight=False), transient=True)


def _update(bar: Any, task: Any, progress: "Progress") -> None:
    if progress.metrics is not None:
        bar.console.print(visible(evaluation_line(progress)), markup=False)
        return
    told = [
        "" if progress.loss is None else f"loss {progress.loss:.3g}",
        "" if progress.seconds_left is None else f"{_clock(progress.seconds_left)} left",
        f"{progress.memory / 1e6:,.0f} MB" if progress.memory else "",
    ]
    bar.update(task, completed=progress.step, total=progress.steps, told="  ".join(part for part in told if part))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
