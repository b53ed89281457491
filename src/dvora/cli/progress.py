"""How long work takes: a bar on a terminal; of training, elsewhere, lines, which begin with an estimate."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..text import visible
from .output import print_line

if TYPE_CHECKING:
    from ..recipes.training.callbacks import OnProgress, Progress

FIRST = 10
"""Steps after which the first estimate is made, or a tenth of the run if that is less."""
LONG = 600
"""Seconds beyond which an estimate says how a run is shortened."""


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What is to be called with how many are done, of how many."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    with _bar(what) as bar:
        task = bar.add_task("", total=None, said="")
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextmanager
def training(quiet: bool) -> "Iterator[OnProgress | None]":
    """What is to be called with the progress of training; None when nothing is to be shown."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield lambda progress: _show(progress, print_line, every_tenth=True)
        return
    bar = _bar("step")
    task = bar.add_task("", total=None, said="")

    def update(progress: "Progress") -> None:
        # With the first step: what is said before would stick to the bar.
        bar.start()
        _show(progress, lambda line: bar.console.print(visible(line), markup=False), every_tenth=False)
        if progress.metrics is None:
            left = "" if progress.seconds_left is None else f"{_clock(progress.seconds_left)} left"
            memory = f"{progress.memory / 1e6:,.0f} MB of memory" if progress.memory else ""
            said = ", ".join(filter(None, (_loss(progress), left, memory)))
            bar.update(task, completed=progress.step, total=progress.steps, said=said)

    try:
        yield update
    finally:
        bar.stop()


def _bar(what: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[said]}", markup=False))
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)


def _show(progress: "Progress", say: Callable[[str], None], every_tenth: bool) -> None:
    """An evaluation, the first estimate, or a tenth of the run."""
    tenth = progress.step * 10 // progress.steps > (progress.step - 1) * 10 // progress.steps
    place, left = f"step {progress.step} of {progress.steps}", progress.seconds_left
    if progress.metrics is not None:
        values = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in progress.metrics.items()
            if not name.endswith(("runtime", "per_second", "tokens"))
        )
        say(f"{place}, validation: {values}{' (best so far)' if progress.is_best else ''}")
    elif progress.measured == min(FIRST, max(1, progress.steps // 10)):
        pace, left = progress.pace or 0.0, left or 0.0
        shorter = f" (--max-steps {max(1, round(LONG / pace))} would take ten minutes)" if left > LONG else ""
        say(f"{place}: {_loss(progress)}, {pace:.2g} s a step, about {_clock(left)} left{shorter}")
    elif every_tenth and tenth and progress.step < progress.steps and left is not None:
        say(f"{place}: {_loss(progress)}, {_clock(left)} left")


def _loss(progress: "Progress") -> str:
    return "training" if progress.loss is None else f"training loss {progress.loss:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
