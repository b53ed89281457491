"""The command: `python -m benchmarks.users` goes on where it was; `--help` says how to do less."""

from benchmarks.results import file_of
from benchmarks.running import go_on, options
from benchmarks.users.jobs import EXAMPLES, said, waiting
from benchmarks.users.sources import SOURCES
from benchmarks.users.training import ARMS, carry_out


def main(arguments: list[str] | None = None) -> None:
    """Train an adapter for each user, with every method, rate and seed that has no row yet."""
    parser = options("python -m benchmarks.users", main.__doc__, file_of("users"))
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--examples", nargs="+", type=int, default=list(EXAMPLES), help="rows of a user")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    chosen = parser.parse_args(arguments)
    go_on(
        chosen.output,
        lambda rows: waiting(rows, chosen.source, chosen.examples, chosen.arm),
        carry_out,
        said,
        chosen,
    )


if __name__ == "__main__":
    main()
