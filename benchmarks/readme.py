"""Writes the figures of README.md and docs/results.md from the committed result files, so that none of them is typed.

Run from the repository's root: python -m benchmarks.readme
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.exactness import RESULT as EXACTNESS
from benchmarks.examples.table import RESULT as EXAMPLES
from benchmarks.examples.table import examples
from benchmarks.quality.grid import read_grid
from benchmarks.quality.page import parts as quality_parts
from benchmarks.quality.results import RESULT as QUALITY
from benchmarks.quality.schedule import remaining
from benchmarks.quality.summary import result_of
from benchmarks.quality.tables import quality
from benchmarks.speed.tables import speed
from benchmarks.support import RESULT as SUPPORT

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.md"
DEMO = ROOT / "benchmarks" / "results" / "demo.json"
SPEED = ROOT / "benchmarks" / "results" / "speed.json"
CONFORMANCE = ROOT / "benchmarks" / "results" / "conformance.json"


def updated(readme: str) -> str:
    """The README with every generated part made anew."""
    return filled(readme, "README.md", readme_parts())


def updated_results(page: str) -> str:
    """The page of results with every generated part made anew."""
    content, grid = _load(QUALITY), read_grid()
    missing = remaining(grid, {row["key"]: row for row in content["rows"]}, list(grid.tasks), list(grid.arms))
    return filled(page, "docs/results.md", quality_parts(result_of(content), content["environment"], missing))


def readme_parts() -> dict[str, str]:
    """The generated parts of the README by name."""
    return {
        "exactness": exactness(_load(EXACTNESS)),
        "demo": demo(_load(DEMO)),
        "support": support(_load(SUPPORT)),
        "examples": examples(_load(EXAMPLES)),
        "conformance": conformance(_load(CONFORMANCE)),
        "speed": speed(_load(SPEED)),
        "quality": quality(_load(QUALITY)),
    }


def filled(page: str, file: str, parts: dict[str, str]) -> str:
    """A page with the text between the marks of each part put in.

    Raises:
        ValueError: a part has no marks in the page, or several.
    """
    for name, text in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        page, found = re.subn(pattern, lambda marks, text=text: f"{marks[1]}{text}{marks[2]}", page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{file} has {found} parts between <!-- {name}:begin --> and end, expected one")
    return page


def exactness(result: dict[str, Any]) -> str:
    """Worst errors by dtype, as a table."""
    rows, environment = result["rows"], result["environment"]
    quantities = {
        "outputs": lambda name: name == "outputs",
        "gradients": lambda name: name.startswith("gradient"),
        "merged weight": lambda name: name == "merged weight",
    }
    lines = [
        f"Worst relative error against the dense float64 method ({len(rows)} combinations of size, direction and "
        f"dtype, 1 x 1 to 1536 x 384, ranks 1 to 256, {len(result['seeds'])} seeds; torch {environment['torch']}, CPU, "
        "`benchmarks/results/exactness.json`):",
        "",
        "| dtype | " + " | ".join(quantities) + " |",
        "|---|" + "---|" * len(quantities),
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        worst = [
            max(e for row in rows if row["dtype"] == dtype for name, e in row["worst"].items() if matches(name))
            for matches in quantities.values()
        ]
        lines.append(f"| {dtype} | " + " | ".join(f"{error:.0e}" for error in worst) + " |")
    return "\n".join(lines) + "\n"


def support(result: dict[str, Any]) -> str:
    """What works: layer types on plain bases, then a linear layer on the others."""
    outcomes = {(row["layer"], row["base"], row["operation"]): row["outcome"] for row in result["rows"]}
    operations = list(dict.fromkeys(operation for _, _, operation in outcomes))
    bases = {layer: [base for name, base, _ in outcomes if name == layer] for layer, _, _ in outcomes}
    plain = list(dict.fromkeys(bases["Conv1d"]))
    others = [base for base in dict.fromkeys(bases["Linear"]) if base not in plain]
    cells = {"works": "yes", "refused": "refused", "the base cannot": "base cannot"}

    def cell(layer: str, chosen: list[str], operation: str) -> str:
        found = {base: cells[outcomes[layer, base, operation]] for base in chosen}
        if len(set(found.values())) == 1:
            return found[chosen[0]]
        return ", ".join(f"{base}: {outcome}" for base, outcome in found.items())

    head = ["| | " + " | ".join(operations) + " |", "|---|" + "---|" * len(operations)]
    layers = [f"| {name} | " + " | ".join(cell(name, plain, o) for o in operations) + " |" for name in bases]
    linear = [f"| {base} | " + " | ".join(cell("Linear", [base], o) for o in operations) + " |" for base in others]
    environment = result["environment"]
    return "\n".join(
        [
            f"{len(outcomes):,} tests (`benchmarks/results/support.json`; torch {environment['torch']}, PEFT "
            f"{environment['peft']}, transformers {environment['transformers']}, CPU). Every layer type in "
            f'{", ".join(plain)}; "refused" is an error that says why and leaves the model alone:',
            "",
            *head,
            *layers,
            "",
            "A linear layer on a quantised base, or on one that shows nothing but its forward pass:",
            "",
            *head,
            *linear,
            "",
        ]
    )


def conformance(result: dict[str, Any]) -> str:
    """How PEFT's own tests went, with the reasons of those that did not simply pass."""
    reasons = sorted(result["reasons"].items(), key=lambda reason: -reason[1])
    return "\n".join(
        [
            f"PEFT {result['environment']['peft']}'s own tests with DVoRA in their lists "
            f"(`benchmarks/results/conformance.json`): {result['passed']:,} passed, {result['failed']} failed, "
            f"{result['listed']} skipped or failing for a reason:",
            "",
            "| tests | reason |",
            "|---|---|",
            *(f"| {count} | {reason} |" for reason, count in reasons),
            "",
        ]
    )


def demo(result: dict[str, Any]) -> str:
    """The demo's table and what it found out, with its picture."""
    scores, differences = result["scores"], result["largest_logit_difference"]
    environment = result["environment"]
    lines = [
        f"Good or bad? {scores['dvora']['count']:,} movie reviews that training did not see "
        f"(`benchmarks/results/demo.json`; torch {environment['torch']}, {environment['threads']} "
        f"threads, seed {result['seed']}, {result['training_seconds']:.0f} s of training):",
        "",
        "| | test accuracy | 95 % interval (Wilson) | trained values |",
        "|---|---|---|---|",
    ]
    for score in scores.values():
        low, high = score["interval"]
        lines.append(
            f"| {score['name']} | {score['accuracy']:.1%} | {low:.1%} to {high:.1%} | {score['trained_values']:,} |"
        )
    lines += [
        "",
        f"The adapter's file has {result['adapter_bytes'] / 1e3:,.0f} kB, the model's "
        f"{result['model_bytes'] / 1e6:,.1f} MB. Loaded in a fresh process its outputs differ by "
        f"{differences['fresh_process']:.2g}; merged into the weights, by {differences['merged']:.2g}. Both "
        "models are read through the same kind of head, and DVoRA starts from the frozen model's. One seed and one "
        "data set: a demonstration, not evidence about the method.",
        "",
        "![Training and validation curves; what training did to magnitude and direction of each layer](demo/curve.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite README.md and docs/results.md in place."""
    for file, update in ((README, updated), (RESULTS, updated_results)):
        file.write_text(update(file.read_text(encoding="utf-8")), encoding="utf-8")


def _load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
