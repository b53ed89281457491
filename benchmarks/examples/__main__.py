"""Runs the examples, or those named, one after another: python -m benchmarks.examples [NAME ...]

Each has a time limit and its own processes, none of which is left. Writes benchmarks/results/examples.json; the exit
status is 1 if one failed.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.examples.catalogue import CATALOGUE, Example
from benchmarks.examples.rows import merged, row_of
from benchmarks.results import file_of, write


def run_all(examples: Sequence[Example], catalogue: Sequence[Example], file: Path) -> int:
    """Run the examples, show a line for each, keep their rows in the file; 1 if one failed."""
    console = Console(highlight=False, markup=False)
    failed = False
    for example in examples:
        with console.status(f"{example.name} (at most {example.limit_seconds:g} s)"):
            row = row_of(example)
        shown = row["figures"] if row["outcome"] == "works" else row["reason"]
        console.print(f"{row['name']:28} {row['outcome']:13} {row['seconds']:6.1f} s  {shown}", soft_wrap=True)
        if "killed" in row:
            console.print(f"{'':28} left behind and killed: {', '.join(row['killed'])}", soft_wrap=True)
        failed = failed or row["outcome"] == "failed"
        # After each: a run that is interrupted keeps what it has found.
        earlier = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
        write(file, merged(earlier, [row], catalogue))
    return int(failed)


def main(arguments: Sequence[str]) -> int:
    """Run those named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.examples", description="Run the examples.")
    known = {example.name: example for example in CATALOGUE}
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all if none is named: " + ", ".join(known))
    names = parser.parse_args(arguments).names or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no example {unknown[0]!r}, only {', '.join(known)}")
    # An end from outside takes the way of an error, on which the example's processes end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_all([known[name] for name in names], CATALOGUE, file_of("examples"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
