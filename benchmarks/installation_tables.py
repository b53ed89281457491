"""Tables of an installation: which versions held, what they take on disk, and how long commands take to start."""

from typing import Any

from benchmarks.tables import table, text

TRIALS = {
    "oldest": "the oldest in Python (`peft`)",
    "oldest-commands": "the oldest of the command line (`report`)",
    "newest": "the newest of everything (`report`)",
}
SHOWN = ("torch", "peft", "transformers", "accelerate", "numpy")
INSTALLED = {"dev": "everything that the tests need", "report": "the extra `report`"}
"""Where commands were started, by the extra that was installed."""
STARTED = ("dvora --help", "import dvora", "dvora.DVoRAConfig", "dvora inspect EMPTY", "dvora predict RUN rows.csv")
"""What the table shows of them: nothing is imported, PEFT is, and everything that a model needs is."""


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


def start_up(result: dict[str, Any]) -> str:
    """Seconds until commands have started, by what is installed beside dvora."""
    now = {
        name: {row["command"]: row for row in result[name]["rows"] if row["source"] == "now"}
        for name in result
        if name in INSTALLED
    }
    first = next(iter(now))
    environment = result[first]["environment"]
    lines = (
        (
            f"`{command}`",
            *(f"{rows[command]['processor_seconds']:.1f} ({rows[command]['seconds']:.1f})" for rows in now.values()),
        )
        for command in STARTED
    )
    return text(
        f"`python -m benchmarks.start_up` (`benchmarks/results/start_up.json`; Python {environment['python']}, torch "
        f"{environment['torch']}, PEFT {environment['peft']}, transformers {environment['transformers']}, "
        f"{environment['cores']} cores, shared with other work). Seconds of the processor, and in brackets seconds on "
        "the clock, medians; a command that works on a folder was given one without an adapter or a model:",
        table(("", *(INSTALLED[name] for name in now)), lines),
    )


def _tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "not run"
    failed = tests.get("failed", 0) + tests.get("error", 0) + tests.get("errors", 0)
    return f"{tests['passed']:,} passed, {failed} failed, {tests.get('skipped', 0)} skipped"
