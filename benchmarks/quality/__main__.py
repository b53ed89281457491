"""The command: `python -m benchmarks.quality` goes on with the grid where it was; `--help` says how to do less."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality.grid import FILE, Grid, Rates, Run, read_grid
from benchmarks.quality.processes import pool_of, rows_of
from benchmarks.quality.results import read_rows, result_file, write_rows
from benchmarks.quality.running import carry_out
from benchmarks.quality.schedule import alone, ready, remaining


def main(arguments: list[str] | None = None) -> int:
    """Carry out what is missing of the grid, or repeat a row."""
    chosen = _parser().parse_args(arguments)
    grid = read_grid(chosen.grid)
    chosen.output = chosen.output or result_file(chosen.grid)
    rows = read_rows(chosen.output)
    if chosen.repeat:
        return _repeat(grid, rows, chosen.repeat)
    tasks, arms = chosen.task or list(grid.tasks), chosen.arm or list(grid.arms)
    if chosen.alone:
        chosen.processes = 1
    _go_on(grid, rows, tasks, arms, chosen)
    return 0


def _go_on(
    grid: Grid, rows: dict[str, dict[str, Any]], tasks: list[str], arms: list[str], chosen: argparse.Namespace
) -> None:
    """Run until nothing is missing or the hours are over; every finished run is in the file at once."""
    end = perf_counter() + chosen.hours * 3600
    choose = alone if chosen.alone else ready

    def waiting() -> list[Run]:
        return [run for run in choose(grid, rows, tasks, arms) if _is_wanted(run, chosen)]

    with _progress() as progress, pool_of(chosen.processes, chosen.nice) as pool:
        bar = progress.add_task("", total=len(rows) + remaining(grid, rows, tasks, arms), completed=len(rows))
        for row in rows_of(pool, partial(carry_out, grid), waiting, chosen.processes, end):
            rows[row["key"]] = row
            write_rows(list(rows.values()), chosen.output)
            progress.update(bar, advance=1, description=f"{row['key']}: {_summary(row)}")
            if not progress.console.is_terminal:
                print(f"{row['key']}: {_summary(row)} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)


def _repeat(grid: Grid, rows: dict[str, dict[str, Any]], key: str) -> int:
    """Carry out the run of a row once more and print both rows."""
    if key not in rows:
        raise SystemExit(
            f"no row has the key {key!r}; keys are in the result file, such as {next(iter(rows), 'none')!r}"
        )
    row = rows[key]
    rates = None if row["rates"] is None else Rates(**row["rates"])
    torch.set_num_threads(1)
    again = carry_out(grid, Run(row["task"], row["arm"], row["stage"], row["seed"], row["steps"], rates))
    for name, each in (("recorded", row), ("repeated", again)):
        print(name, json.dumps({key: value for key, value in each.items() if key != "items"}, indent=2))
    return 0


def _is_wanted(run: Run, chosen: argparse.Namespace) -> bool:
    return chosen.seed is None or run.stage != "final" or run.seed in chosen.seed


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    if row["stage"] == "alone" and not row.get("diverged"):
        return f"{row['seconds_per_step']:.2f} s a step"
    if row.get("validation") is None:
        return "diverged"
    score = (row.get("test") or row["validation"])["score"]
    return f"{'test' if 'test' in row else 'validation'} {score:.4f}"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=main.__doc__)
    parser.add_argument("--hours", type=float, default=6.0, help="start no run after so many hours")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--nice", type=int, default=0, help="lower the priority of the runs by so much")
    parser.add_argument("--task", nargs="+", help="of the grid; left out, all")
    parser.add_argument("--arm", nargs="+", help="of the grid; left out, all")
    parser.add_argument("--seed", nargs="+", type=int, help="of the final runs; left out, all")
    parser.add_argument("--alone", action="store_true", help="a few steps of each arm, one at a time: time and memory")
    parser.add_argument("--repeat", metavar="KEY", help="repeat the run of a row and print both")
    parser.add_argument("--grid", type=Path, default=FILE, help="a file of grids/")
    parser.add_argument("--output", type=Path, help="left out, the file in benchmarks/results/ with the grid's name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
