"""The result file: each section's rows take the place of its earlier ones, as long as all are of one environment."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.many_adapters.plan import LEFT_OUT
from benchmarks.results import write
from benchmarks.speed.runner import Report


def check_environment(file: Path, sections: list[str]) -> None:
    """Refuse to put rows beside others that were measured with other versions, or another number of threads.

    Args:
        file: of the results; it need not be there.
        sections: whose rows will be made anew.

    Raises:
        ValueError: rows that stay are of another environment.
    """
    earlier = _read(file)
    stay = sorted({row["section"] for row in earlier["rows"]} - set(sections))
    if stay and earlier["environment"] != environment():
        differing = {
            name: (earlier["environment"].get(name), value)
            for name, value in environment().items()
            if earlier["environment"].get(name) != value
        }
        raise ValueError(
            f"{file} has rows of {', '.join(stay)} from another environment (then and now: {differing}); measure "
            "everything anew, or name another file with --output"
        )


def merge(file: Path, section: str, report: Report, seconds: float) -> None:
    """Put the rows of a section into the file, in the place of its earlier ones.

    Args:
        file: of the results.
        section: whose they are.
        report: what was measured.
        seconds: that it took.
    """
    earlier = _read(file)
    whole = Report()
    for of_all, of_earlier, new in (
        (whole.rows, earlier["rows"], [*report.rows, {"part": "duration", "took": round(seconds)}]),
        (whole.not_measured, earlier["not_measured"], report.not_measured),
    ):
        of_all += [each for each in of_earlier if each["section"] != section]
        of_all += [{"section": section, **each} for each in new]
    write(file, whole.rows, left_out=LEFT_OUT, not_measured=whole.not_measured)


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"environment": environment(), "rows": [], "not_measured": []}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
