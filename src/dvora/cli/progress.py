"""How training shows where it is: a bar on a terminal, else lines; both begin with an estimate of how long it takes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..tools.pages.text import visible
from .output import print_line

if TYPE_CHECKING:
    from ..recipes.training.watching import OnProgress, Progress

FIRST = 10
"""Steps after which the first estimate is made, or a tenth of the run if that is less."""
LONG = 600
"""Seconds beyond which an estimate says how a run is shortened."""


@contextmanager
def shown_progress(quiet: bool) -> "Iterator[OnProgress | None]":
    """What is to be called with progress; None when nothing is to be shown."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield lambda progress: _show(progress, print_line, every_tenth=True)
    else:
        bar = _bar()
        task = bar.add_task("", total=None, said="")

        def update(progress: "Progress") -> None:
            # With the first step: what is said before would stick to the bar.
            bar.start()
            _update(bar, task, progress)

        try:
            yield update
        finally:
            bar.stop()


def _show(progress: "Progress", say: Callable[[str], None], every_tenth: bool) -> None:
    """An evaluation, the first estimate, or a tenth of the run."""
    tenth = progress.step * 10 // progress.steps > (progress.step - 1) * 10 // progress.steps
    if progress.metrics is not None:
        say(evaluation_line(progress))
    elif progress.made == min(FIRST, max(1, progress.steps // 10)):
        say(estimate_line(progress))
    elif every_tenth and tenth and progress.step < progress.steps and progress.seconds_left is not None:
        say(f"{_place(progress)}: {_loss(progress)}, {_clock(progress.seconds_left)} left")


def evaluation_line(progress: "Progress") -> str:
    """An evaluation in one line."""
    values = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in (progress.metrics or {}).items()
        if not name.endswith(("runtime", "per_second", "tokens"))
    )
    return f"{_place(progress)}, validation: {values}{' (best so far)' if progress.is_best else ''}"


def estimate_line(progress: "Progress") -> str:
    """How long the rest takes at the pace so far; of a long run, how to shorten it."""
    pace, left = progress.pace or 0.0, progress.seconds_left or 0.0
    line = f"{_place(progress)}: {_loss(progress)}, {pace:.2g} s a step, about {_clock(left)} left"
    if left > LONG:
        line += f" (--max-steps {max(1, round(LONG / pace))} would take ten minutes)"
    return line


def _place(progress: "Progress") -> str:
    return f"step {progress.step} of {progress.steps}"


def _loss(progress: "Progress") -> str:
    return "training" if progress.loss is None else f"training loss {progress.loss:.3g}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[said]}", markup=False))
    return Bar(*columns, console=Console(stderr=True, highlight=False), transient=True)


def _update(bar: Any, task: Any, progress: "Progress") -> None:
    _show(progress, lambda line: bar.console.print(visible(line), markup=False), every_tenth=False)
    if progress.metrics is None:
        said = [
            _loss(progress),
            "" if progress.seconds_left is None else f"{_clock(progress.seconds_left)} left",
            f"{progress.memory / 1e6:,.0f} MB of memory" if progress.memory else "",
        ]
        bar.update(task, completed=progress.step, total=progress.steps, said=", ".join(filter(None, said)))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
