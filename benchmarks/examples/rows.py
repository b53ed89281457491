"""One row of the result file for each example: its outcome, and the rows of earlier runs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.examples.catalogue import Example
from benchmarks.examples.processes import Ended, run

ROOT = Path(__file__).parent.parent.parent
# As many as show an error above what a launcher says of it.
LAST_LINES = 30

# How the line begins that `examples.checks.report` prints.
HEAD = '{"works": '

Row = dict[str, Any]


def row_of(example: Example) -> Row:
    """Run an example in processes of its own."""
    head = {"name": example.name, "trainer": example.trainer, "shows": example.shows, "processes": example.processes}
    if missing := [package for package in example.needs if _version(package) is None]:
        reason = f"install {', '.join(missing)}"
        return {**head, "outcome": "not installed", "reason": reason, "seconds": 0.0, "figures": {}, "versions": {}}
    ended = run([sys.executable, *example.launcher, "-m", f"examples.{example.name}"], example.limit_seconds, ROOT)
    row = {**head, **_outcome(example, ended), "seconds": round(ended.seconds, 1)}
    row["versions"] = {package: _version(package) for package in example.needs} | row["versions"]
    return row | ({"killed": list(ended.killed)} if ended.killed else {})


def merged(earlier: Iterable[Row], new: Iterable[Row], catalogue: Sequence[Example]) -> list[Row]:
    """The rows of the catalogue's examples in its order, each from its last run."""
    rows = {row["name"]: row for row in earlier}
    for row in new:
        # What could not be tried here says nothing against what was found elsewhere.
        if row["outcome"] != "not installed" or row["name"] not in rows:
            rows[row["name"]] = row
    return [rows[example.name] for example in catalogue if example.name in rows]


def read_report(output: str) -> dict[str, Any] | None:
    """The report in an example's standard output; None if it made none."""
    lines = [line for line in output.splitlines() if line.startswith(HEAD)]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found


def _outcome(example: Example, ended: Ended) -> Mapping[str, Any]:
    found = read_report(ended.stdout)
    if ended.status == 0 and found is not None:
        reported = {"figures": found.get("figures", {}), "versions": found.get("versions", {})}
        if found["works"]:
            return {"outcome": "works", **reported}
        return {"outcome": found["outcome"], "reason": found["reason"], **reported}
    if ended.status is None:
        reason = f"still running after {example.limit_seconds:g} s, and killed"
    elif ended.status:
        reason = f"exit status {ended.status}"
    else:
        reason = "no report"
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-LAST_LINES:]
    return {"outcome": "failed", "reason": "\n".join([reason, *lines]), "figures": {}, "versions": {}}


def _version(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None
