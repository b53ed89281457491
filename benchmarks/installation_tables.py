"""Tables of an installation: which versions held, what they take on disk, and how long commands take to start."""

from typing import Any

TRIALS = {
    "oldest": "the oldest in Python (`peft`)",
    "oldest-commands": "the oldest of the command line (`report`)",
    "newest": "the newest of everything (`report`)",
}
SHOWN = ("torch", "peft", "transformers", "accelerate", "numpy")
INSTALLED = {"dev": "everything that the tests need", "report": "the extra `report`"}
"""Where commands were started, by the extra that was installed."""


def versions(result: dict[str, Any]) -> str:
    """Which versions were installed together, and what was tried with them."""
    lines = [
        f"`make versions` (`benchmarks/results/versions.json`; {result['system']}):",
        "",
        "| installed | Python | " + " | ".join(SHOWN) + " | size | tried | tests |",
        "|---|" + "---|" * (len(SHOWN) + 4),
    ]
    for row in result["rows"]:
        found = [row["versions"][package] for package in SHOWN]
        done = "quick start, commands" if row["extra"] == "report" else "quick start"
        cells = [row["python"], *found, f"{row['installed_megabytes'] / 1e3:.1f} GB", done, _tests(row.get("tests"))]
        lines.append(f"| {TRIALS[row['name']]} | " + " | ".join(cells) + " |")
    failures = [f"`{name}`" for row in result["rows"] for name in row.get("tests", {}).get("failures", ())]
    return "\n".join([*lines, *(["", f"Failed: {', '.join(failures)}."] if failures else []), ""])


def start_up(result: dict[str, Any]) -> str:
    """Seconds until commands have started, by what is installed beside dvora."""
    environments = {name: content for name, content in result.items() if name in INSTALLED}
    now = {
        name: {row["command"]: row for row in content["rows"] if row["source"] == "now"}
        for name, content in environments.items()
    }
    first = next(iter(environments.values()))["environment"]
    lines = [
        f"`python -m benchmarks.start_up` (`benchmarks/results/start_up.json`; Python {first['python']}, torch "
        f"{first['torch']}, PEFT {first['peft']}, transformers {first['transformers']}, {first['cores']} cores, "
        "shared with other work). Seconds of the processor, and in brackets seconds on the clock, medians; a command "
        "that works on a folder was given one that is not there:",
        "",
        "| | " + " | ".join(INSTALLED[name] for name in now) + " |",
        "|---|" + "---|" * len(now),
    ]
    for command in next(iter(now.values())):
        cells = [f"{rows[command]['processor_seconds']:.1f} ({rows[command]['seconds']:.1f})" for rows in now.values()]
        lines.append(f"| `{command}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "not run"
    failed = tests.get("failed", 0) + tests.get("error", 0) + tests.get("errors", 0)
    return f"{tests['passed']:,} passed, {failed} failed, {tests.get('skipped', 0)} skipped"
