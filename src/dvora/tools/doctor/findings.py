"""What checks found: whether each passed, the numbers, where, and what to do about it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        check: its name.
        status: "pass"; "warn" for what may be intended; "fail" for what is wrong; "skip" for what was not checked.
        found: what was found, in a line.
        advice: what to do; empty where nothing has to be done.
        figures: the numbers behind it.
        layers: names of the layers or parameters that it is about.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    """All findings on a model.

    Args:
        findings: one for each check.
        layers: how many adapted layers there are.
        looked_at: how many of them were checked one by one.
    """

    findings: tuple[Finding, ...]
    layers: int
    looked_at: int

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(finding for finding in self.findings if finding.status == "fail")

    @property
    def verdict(self) -> str:
        """What it all comes to, in a sentence."""
        counts = Counter(finding.status for finding in self.findings)
        names = {
            status: ", ".join(finding.check for finding in self.findings if finding.status == status)
            for status in counts
        }
        skipped = f"; not possible here: {names['skip']}" if counts["skip"] else ""
        if counts["fail"]:
            return f"{counts['fail']} of {len(self.findings)} checks failed ({names['fail']}): do not use this adapter"
        if counts["warn"]:
            return f"no check failed, {counts['warn']} warned ({names['warn']}): read what to do{skipped}"
        return f"all {counts['pass']} checks passed{skipped}"

    @property
    def healthy(self) -> bool:
        """Whether nothing failed and nothing was warned of."""
        return all(finding.status in ("pass", "skip") for finding in self.findings)

    def rows(self) -> list[dict[str, str]]:
        """A row of a table for each check."""
        return [{"": finding.status, "check": finding.check, "found": finding.found} for finding in self.findings]

    def of(self, check: str) -> Finding:
        """The finding of one check.

        Raises:
            KeyError: there is none of that name.
        """
        return {finding.check: finding for finding in self.findings}[check]

    def __str__(self) -> str:
        """A line a check, and the advice below those that need it."""
        width = max(len(finding.check) for finding in self.findings)
        lines = [f"{self.looked_at} of {self.layers} adapted layers were checked one by one"]
        for finding in self.findings:
            lines.append(f"{finding.status:4}  {finding.check:{width}}  {finding.found}")
            if finding.advice:
                lines.append(f"{'':{width + 8}}{finding.advice}")
        return "\n".join([*lines, f"Verdict: {self.verdict}"])
