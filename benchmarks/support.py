"""What works: runs the tests of every layer type on every base, and records the outcome of each that passed.

Run from the repository's root: python -m benchmarks.support
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.results import file_of, write

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "peft" / "test_support.py"
RESULT = file_of("support")
COLUMNS = ("layer", "base", "operation", "outcome")


def rows(report: Path) -> list[dict[str, str]]:
    """One row for every test of a junit report that recorded an outcome."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if set(COLUMNS) <= properties.keys():
            found.append({column: properties[column] for column in COLUMNS})
    return found


def main() -> int:
    """Run the tests; the result file is replaced only if all of them passed."""
    with tempfile.TemporaryDirectory() as folder:
        report, earlier = Path(folder) / "report.xml", RESULT.read_bytes()
        # The tests compare with it, and it may be wrong by now.
        RESULT.unlink()
        command = [sys.executable, "-m", "pytest", str(TESTS), f"--junitxml={report}", "-o", "junit_family=xunit1"]
        failed = subprocess.run(command, cwd=ROOT, check=False).returncode
        if failed:
            RESULT.write_bytes(earlier)
            return failed
        write(RESULT, rows(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
