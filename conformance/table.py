"""Tables of tests with a reason: which tests, by patterns, and one sentence that says why."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """Some tests and the reason that they share.

    Args:
        kind: heading of the entry.
        tests: node ids; `*` stands for anything.
        reason: one sentence.
        error: regular expression that is found in the type and message of the error, for tests that fail.
    """

    kind: str
    tests: tuple[str, ...]
    reason: str
    error: str | None = None

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {test: re.compile(".*".join(map(re.escape, test.split("*")))) for test in self.tests}

    def matches(self, node_id: str) -> bool:
        return any(pattern.fullmatch(node_id) for pattern in self._patterns.values())

    def unused(self, node_ids: Iterable[str]) -> list[str]:
        """The patterns that match none of the tests."""
        ids = list(node_ids)
        return [test for test, pattern in self._patterns.items() if not any(map(pattern.fullmatch, ids))]


@dataclass(frozen=True)
class Table:
    """The entries of a file."""

    path: Path
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a TOML file of `[[kind]]` entries with `tests`, `reason` and perhaps `error`."""
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = ((kind, entry) for kind, group in content.items() for entry in group)
        return cls(path, tuple(Entry(kind, **entry | {"tests": tuple(entry["tests"])}) for kind, entry in entries))

    def entry(self, kind: str, item: pytest.Item) -> Entry | None:
        """Where the test is listed under this heading; None where it is not."""
        return next((e for e in self.entries if e.kind == kind and e.matches(item.nodeid)), None)

    def check_all_used(self, items: Iterable[pytest.Item], config: pytest.Config) -> None:
        """Refuse a table with patterns that match no test of the files that were asked for.

        Raises:
            UsageError: with the patterns.
        """
        if config.getoption("of_another_version") or any("::" in argument for argument in config.args):
            return
        ids = [item.nodeid for item in items]
        files = {node_id.partition("::")[0] for node_id in ids}
        unused = [test for entry in self.entries for test in entry.unused(ids) if test.partition("::")[0] in files]
        if unused:
            raise pytest.UsageError(f"{self.path.name} lists tests that do not exist:\n  " + "\n  ".join(unused))
