"""The table of an installation: which versions held, and what they take on disk."""

from typing import Any

from benchmarks.tables import table, text

TRIALS = {
    "oldest": "the oldest in Python (`peft`)",
    "oldest-commands": "the oldest of the command line (`report`)",
    "newest": "the newest of everything (`report`)",
}
SHOWN = ("torch", "peft", "transformers", "accelerate", "numpy")


def versions(result: dict[str, Any]) -> str:
    """Which versions were installed together, and what was tried with them."""
    lines = []
    for row in result["rows"]:
        done = "quick start, commands" if row["extra"] == "report" else "quick start"
        size = f"{row['installed_megabytes'] / 1e3:.1f} GB"
        installed = (row["versions"][package] for package in SHOWN)
        lines.append((TRIALS[row["name"]], row["python"], *installed, size, done, _tests(row.get("tests"))))
    listed = [test for row in result["rows"] for test in row.get("tests", {}).get("failures", ())]
    failures = [f"`{test.partition(' - ')[0]}`" for test in listed]
    return text(
        f"`make versions` (`benchmarks/results/versions.json`; {result['system']}):",
        table(("installed", "Python", *SHOWN, "size", "tried", "tests"), lines),
        f"Failed: {', '.join(failures)}." if failures else "",
    )


def _tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "not run"
    failed = tests.get("failed", 0) + tests.get("error", 0) + tests.get("errors", 0)
    return f"{tests['passed']:,} passed, {failed} failed, {tests.get('skipped', 0)} skipped"
