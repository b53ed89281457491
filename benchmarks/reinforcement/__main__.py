"""The command: `python -m benchmarks.reinforcement` goes on where it was; `--help` says how to do less."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

from benchmarks.pictures import save
from benchmarks.quality.processes import in_a_fresh_process, rows_of
from benchmarks.quality.results import FOLDER, read_rows, write_rows
from benchmarks.reinforcement.arms import ARMS
from benchmarks.reinforcement.plan import missing
from benchmarks.reinforcement.problems import PROBLEMS
from benchmarks.reinforcement.tables import picture, said, shown
from benchmarks.reinforcement.training import carry_out

RESULT = FOLDER / "reinforcement.json"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, one process a core, until nothing is or the hours are over."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reinforcement", description=main.__doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="start no run after so many hours")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    rows = read_rows(chosen.output)
    end = perf_counter() + chosen.hours * 3600
    # A process that has trained keeps TRL's state, so each run gets a new one; a thread waits for it.
    carried_out = partial(in_a_fresh_process, carry_out)
    with ThreadPoolExecutor(chosen.processes) as threads:
        waiting = partial(missing, rows, chosen.problem, chosen.arm)
        for row in rows_of(threads, carried_out, waiting, chosen.processes, end):
            rows[row["key"]] = row
            write_rows(list(rows.values()), chosen.output)
            print(f"{row['key']}: {said(row)} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)
    if shown(finished := list(rows.values())):
        save("reinforcement", lambda: picture(finished))


if __name__ == "__main__":
    main()
