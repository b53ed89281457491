"""A pytest plugin that compares every outcome with `expected.toml`.

A test that is listed as failing must fail, and with the error that is listed; one that is listed as skipped must be
skipped; all others must pass. An unlisted skip is a failure too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import pytest

from conformance.table import HERE, Table

TABLE_KEY = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    parser.addoption("--expected", type=Path, default=HERE / "expected.toml", help="the table of expected outcomes")
    parser.addoption("--of-another-version", action="store_true", help="tests that the tables list may be gone")
    parser.addoption("--record", type=Path, help="write the counts of a whole run to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Read the table."""
    config.stash[TABLE_KEY] = Table.read(config.getoption("--expected"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Expect the listed failures."""
    table = config.stash[TABLE_KEY]
    if not config.getoption("keyword"):
        table.check_all_used(items, config)
    for item in items:
        if (listed := table.entry("failing", item)) is not None:
            item.add_marker(pytest.mark.xfail(strict=True, reason=listed.reason))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn into a failure: a skip that is not listed, a listed skip that ran, a listed failure with another error."""
    report = yield
    table = item.config.stash[TABLE_KEY]
    listed = table.entry("skipped", item)
    expected = table.entry("failing", item)
    raised = "" if call.excinfo is None else call.excinfo.exconly()
    message = None
    if report.skipped and not hasattr(report, "wasxfail"):
        if listed is None:
            message = f"It was skipped without being listed: {raised or report.longrepr}"
        else:
            report.user_properties.append(("listed", listed.reason))
    elif report.skipped and expected is not None and not re.search(expected.error or "", raised):
        message = f"It is listed as failing with {expected.error!r}, and failed with: {raised}"
    elif report.when == "call" and listed is not None:
        message = f"It is listed as skipped ({listed.reason}) and was not."
    if message is not None:
        report.outcome, report.longrepr = "failed", message
        vars(report).pop("wasxfail", None)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests passed, were listed and failed, and list the reasons."""
    stats = terminalreporter.stats
    reasons = Counter(report.wasxfail.removeprefix("reason: ") for report in stats.get("xfailed", []))
    reasons += Counter(dict(report.user_properties)["listed"] for report in stats.get("skipped", []))
    counts = {
        "passed": len(stats.get("passed", [])),
        "listed": sum(reasons.values()),
        "failed": len(stats.get("failed", [])) + len(stats.get("error", [])),
    }
    terminalreporter.section(f"PEFT {version('peft')}'s own tests on DVoRA")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5}  {reason}")
    terminalreporter.line(", ".join(f"{count} {name}" for name, count in counts.items()))
    if path := config.getoption("--record"):
        files = Counter(report.nodeid.partition("::")[0] for report in stats.get("passed", []))
        result = counts | {"passed_by_file": dict(sorted(files.items())), "reasons": dict(reasons.most_common())}
        _record(result, path)


def _record(result: dict[str, object], path: Path) -> None:
    # torch takes seconds to import, and only this needs it.
    from benchmarks.environment import environment

    path.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n", encoding="utf-8")
