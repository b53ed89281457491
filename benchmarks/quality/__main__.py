"""The command: `python -m benchmarks.quality` goes on with the grid where it was; `--help` says how to do less."""

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.quality.grid import FILE, Rates, Run, read_grid
from benchmarks.quality.running import carry_out
from benchmarks.results import Row, file_of, read_rows
from benchmarks.running import go_on, options, pool_of


def main(arguments: list[str] | None = None) -> int:
    """Carry out what is missing of the grid, or repeat a row."""
    parser = options("python -m benchmarks.quality", main.__doc__)
    parser.add_argument("--grid", type=Path, default=FILE, help="another file like benchmarks/quality/equal_bytes.yaml")
    parser.add_argument("--task", nargs="+", help="of the grid; left out, all")
    parser.add_argument("--arm", nargs="+", help="of the grid; left out, all")
    parser.add_argument("--repeat", metavar="KEY", help="repeat the run of a row and print both")
    chosen = parser.parse_args(arguments)
    grid, file = read_grid(chosen.grid), chosen.output or file_of(chosen.grid.stem)
    run_one = partial(carry_out, grid)
    if chosen.repeat:
        row = read_rows(file).get(chosen.repeat)
        if row is None:
            raise SystemExit(f"no row of {file} has the key {chosen.repeat!r}")
        rates = row["rates"] and Rates(**row["rates"])
        run = Run(row["task"], row["arm"], row["stage"], row["seed"], row["steps"], rates)
        with pool_of(1) as pool:
            again = pool.submit(run_one, run).result()
        for name, shown in (("recorded", row), ("repeated", again)):
            print(name, json.dumps({key: value for key, value in shown.items() if key != "items"}, indent=2))
        return 0
    tasks, arms = chosen.task or list(grid.tasks), chosen.arm or list(grid.arms)
    go_on(file, lambda rows: grid.waiting(rows, tasks, arms), run_one, _said, chosen)
    return 0


def _said(row: Row) -> str:
    if row.get("validation") is None:
        return "diverged"
    return f"{'test' if 'test' in row else 'validation'} {(row.get('test') or row['validation'])['score']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
