"""The result file, and the same metrics on a terminal."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.speed.metrics import Rows
from benchmarks.speed.plan import LEFT_OUT
from benchmarks.speed.runner import Report
from benchmarks.speed.tables import written
from benchmarks.speed.targets import Target, all_targets
from benchmarks.speed.timing import ratios, spread
from benchmarks.speed.workloads import SEED

SETTING = ("part", "workload", "dtype", "batch", "tokens")


def write(report: Report, file: Path, seconds: float, left_out: Sequence[str] = LEFT_OUT) -> None:
    """Write the result file whole or not at all.

    Args:
        report: what was measured.
        file: to write.
        seconds: that the run took.
        left_out: what was not measured on purpose.
    """
    result: dict[str, Any] = {
        "environment": environment(),
        "seed": SEED,
        "seconds": round(seconds),
        "left_out": list(left_out),
        "not_measured": report.not_measured,
        "rows": report.rows,
    }
    lines = json.dumps({**result, "rows": []}, indent=1).removesuffix("[]\n}")
    # One row a line: the file can be read, and a change of it, too.
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report.rows)
    partial = file.with_suffix(".partial")
    partial.write_text(f"{lines}[\n{rows}\n ]\n}}\n", encoding="utf-8")
    partial.replace(file)


def show(report: Report, targets_of: Callable[[Rows], list[Target]] = all_targets) -> None:
    """Ratios to the base, the targets, and what is missing."""
    console = Console()
    timed = [row for row in report.rows if all(key in row for key in ("batch", "seconds"))]
    for setting in dict.fromkeys(_setting(row) for row in timed):
        console.print(_ratios([row for row in timed if _setting(row) == setting], " ".join(map(str, setting))))
    console.print(_targets(targets_of(report.rows)))
    for miss in report.not_measured:
        console.print(f"not measured: {miss['what']}: {miss['reason']}", markup=False)


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in SETTING)


def _ratios(rows: Rows, title: str) -> Table:
    table = Table("", "ms", "to base", "quartiles", title=title)
    for row in rows:
        low, median, high = spread(ratios(row["seconds"], rows[0]["seconds"]))
        milliseconds = spread(row["seconds"]).median * 1e3
        table.add_row(row["arm"], f"{milliseconds:.2f}", f"{median:.3f}", f"{low:.3f} - {high:.3f}")
    return table


def _targets(targets: Sequence[Target]) -> Table:
    table = Table("metric", "target", "median", "quartiles", "met", title="targets")
    for target in targets:
        if target.measured is not None:
            low, median, high = (written(value, target.unit) for value in target.measured)
            limit = f"{'>=' if target.at_least else '<='} {written(target.limit, target.unit)}"
            table.add_row(target.metric, limit, median, f"{low} - {high}", "yes" if target.met else "no")
    return table
