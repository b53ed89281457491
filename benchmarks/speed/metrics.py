"""Metrics from the rows of a result file: ratios of times within a round, and looked-up rows. Pure functions."""

from collections.abc import Sequence

from benchmarks.results import Row
from benchmarks.speed.timing import Spread, ratios, spread

Rows = Sequence[Row]


def row_of(rows: Rows, **values: object) -> Row | None:
    """The one row with these values, or None.

    Raises:
        ValueError: several rows have them.
    """
    matching = [row for row in rows if all(row.get(key) == value for key, value in values.items())]
    if len(matching) > 1:
        raise ValueError(f"expected one row with {values}, found {len(matching)}")
    return matching[0] if matching else None


def time_ratio(rows: Rows, arm: str, to: str, **setting: object) -> Spread | None:
    """Time of one method in units of another's, of the same rounds of the same run; None if one of them is missing.

    Args:
        rows: of the result file.
        arm, to: names of the two methods.
        setting: part, workload, dtype, batch, tokens.
    """
    first, second = row_of(rows, arm=arm, **setting), row_of(rows, arm=to, **setting)
    if first is None or second is None:
        return None
    return spread(ratios(first["seconds"], second["seconds"]))


def exactly(value: float) -> Spread:
    """A metric that is counted, not timed."""
    return Spread(value, value, value)
