"""Metrics from the rows of a result file: ratios of times within a round, and looked-up rows. Pure functions."""

from collections.abc import Sequence
from typing import Any

from benchmarks.speed.timing import Spread, ratios, spread

Row = dict[str, Any]
Rows = Sequence[Row]


def row_of(rows: Rows, **values: object) -> Row | None:
    """The one row with these values, or None.

    Raises:
        ValueError: several rows have them.
    """
    found = [row for row in rows if all(row.get(key) == value for key, value in values.items())]
    if len(found) > 1:
        raise ValueError(f"expected one row with {values}, found {len(found)}")
    return found[0] if found else None


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


def share(row: Row | None, part: str, whole: str) -> Spread | None:
    """The spread of the ratio of two series in one row."""
    return None if row is None else spread(ratios(row[part], row[whole]))


def kernels_a_layer(row: Row | None) -> Spread | None:
    """Kernels of a row of the part "kernels", for each adapted layer, beyond the frozen base's."""
    return None if row is None else exactly((row["kernels"] - row["base_kernels"]) / row["layers"])


def host_seconds(row: Row) -> list[float]:
    """Seconds of every round of a row of the part "host time", a layer, beyond the frozen base's in that round."""
    pairs = zip(row["seconds"], row["base_seconds"], strict=True)
    return [(seconds - of_base) / row["layers"] for seconds, of_base in pairs]


def host_ratio(rows: Rows, arm: str, to: str, **setting: object) -> Spread | None:
    """Host time of one method beyond the base's, in another's; None if one of them is missing."""
    first, second = (row_of(rows, part="host time", arm=name, **setting) for name in (arm, to))
    if first is None or second is None:
        return None
    return spread(ratios(host_seconds(first), host_seconds(second)))


def exactly(value: float) -> Spread:
    """A metric that is counted, not timed."""
    return Spread(value, value, value)


def worst(metrics: Sequence[Spread | None]) -> Spread | None:
    """The metric with the largest median; None if one is missing."""
    present = [metric for metric in metrics if metric is not None]
    return max(present, key=lambda metric: metric.median) if present and len(present) == len(metrics) else None
