"""The command: `python -m benchmarks.tenants` goes on where it was; `--help` says how to do less."""

from benchmarks.results import Row, file_of
from benchmarks.running import go_on, options
from benchmarks.tenants.training import ARMS, TASK, carry_out, grid_of_tenants


def main(arguments: list[str] | None = None) -> None:
    """Train a classifier for each tenant, with every method and rate that has no row yet."""
    parser = options("python -m benchmarks.tenants", main.__doc__, file_of("tenants"))
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    chosen = parser.parse_args(arguments)
    grid = grid_of_tenants()
    go_on(chosen.output, lambda rows: grid.waiting(rows, [TASK], chosen.arm), carry_out, _said, chosen)


def _said(row: Row) -> str:
    return f"{row.get('test') or row['validation']}"


if __name__ == "__main__":
    main()
