"""The table of trainers on the page "What works with what", from what the examples reported."""

from pathlib import Path
from typing import Any

from benchmarks.tables import table, text

RESULT = Path(__file__).parent.parent / "results" / "examples.json"


def examples(result: dict[str, Any]) -> str:
    """Trainer, whether it works, and the example, as a table."""
    rows, environment = result["rows"], result["environment"]
    works = sum(row["outcome"] == "works" for row in rows)
    lines = []
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        outcome = "yes" if row["outcome"] == "works" else f"{row['outcome']}: {_one_line(row['reason'])}"
        trainer = row["trainer"] + (f" ({versions})" if versions else "")
        example = f"`examples/{row['name']}.py`"
        lines.append((trainer, outcome, example))
    return text(
        f"{works} of {len(rows)} examples work (`make examples`, `benchmarks/results/examples.json`; torch "
        f"{environment['torch']}, PEFT {environment['peft']}, transformers {environment['transformers']}, CPU). Each "
        "trains, and stops with an error if what it shows does not hold:",
        table(("trainer", "works", "example"), lines),
    )


def describe_metrics(metrics: dict[str, Any]) -> str:
    """Metrics in words: `{"loss": [0.7, 0.5], "adapter_bytes": 2000}` is "loss 0.7 to 0.5, adapter 2 kB"."""
    return ", ".join(_metric(name, value) for name, value in metrics.items())


def _metric(name: str, value: Any) -> str:
    shown = _value(value, in_bytes=name.endswith("_bytes"))
    label = "trained parameters" if name == "trained_values" else name.removesuffix("_bytes").replace("_", " ")
    return f"{label} {shown}"


def _value(value: Any, in_bytes: bool) -> str:
    if isinstance(value, list):
        return " to ".join(_value(each, in_bytes) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if in_bytes:
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.3g} kB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(reason: str) -> str:
    return " ".join(reason.split()).replace("|", "\\|")
