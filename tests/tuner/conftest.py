"""Settings of the tests of the PEFT method."""

from collections import Counter

import pytest

_OUTCOMES = pytest.StashKey[Counter[tuple[str, str]]]()


@pytest.fixture
def outcomes(pytestconfig: pytest.Config) -> Counter[tuple[str, str]]:
    """Loads of damaged folders, counted by what was damaged and how it ended; shown after the tests."""
    return pytestconfig.stash.setdefault(_OUTCOMES, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(_OUTCOMES, Counter())
    if not counts:
        return
    terminalreporter.section(f"{counts.total()} loads of damaged adapter folders")
    damages = sorted({damage for damage, _ in counts})
    for end in sorted({end for _, end in counts}):
        each = ", ".join(f"{damage} {counts[damage, end]}" for damage in damages if counts[damage, end])
        terminalreporter.write_line(f"{sum(counts[d, end] for d in damages):6}  {end}  ({each})")
