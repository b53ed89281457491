"""Which runs follow from which results."""

from benchmarks.quality.grid import read_grid
from benchmarks.results import file_of, read_rows

GRID = read_grid()


def test_the_committed_rows_are_those_of_the_grid() -> None:
    """What was tuned, chosen and trained is what this grid would tune, choose and train again."""
    rows = read_rows(file_of("equal_bytes"))
    keys = {run.key for run in GRID.waiting(rows, list(GRID.tasks), list(GRID.arms))}
    assert {key for key, each in rows.items() if each["stage"] != "alone"} <= keys
    assert {key.split()[0] for key in keys - rows.keys()} == {"cron_expressions"}
