"""Writes the tables of README.md and of the pages from the committed result files, so that no number is typed.

Run from the repository's root: python -m benchmarks.readme
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.examples.table import examples
from benchmarks.gate import compiling
from benchmarks.gate import page as gate
from benchmarks.installation_tables import start_up, versions
from benchmarks.many_adapters.tables import parts as many_adapters_parts
from benchmarks.quality.equal_bytes_page import at_a_glance
from benchmarks.quality.equal_bytes_page import parts as equal_bytes_parts
from benchmarks.quality.grid import FILE, read_grid
from benchmarks.quality.page import parts as quality_parts
from benchmarks.quality.schedule import remaining
from benchmarks.quality.summary import result_of
from benchmarks.reinforcement.tables import reinforcement
from benchmarks.speakers import table as speakers
from benchmarks.speed.overhead_tables import overhead
from benchmarks.speed.tables import speed, targets
from benchmarks.users.tables import users

ROOT = Path(__file__).parent.parent
OPERATIONS = {
    "starts as the base": "equals the base at the start",
    "several at once, strength": "several active, strength",
    "an adapter a row": "one adapter per row",
}
"""Columns of the table of support that have another name in the result file."""
BASES = {
    "bnb_int8": "bitsandbytes int8",
    "bnb_nf4": "bitsandbytes nf4",
    "bnb_fp4": "bitsandbytes fp4",
    "bnb_nf4_bfloat16": "bitsandbytes nf4, bfloat16",
    "torchao_int8": "torchao int8",
    "torchao_int4": "torchao int4",
    "torchao_int8_bfloat16": "torchao int8, bfloat16",
    "torchao_int8_dynamic": "torchao int8, dynamic activations",
    "hqq_8bit": "HQQ 8 bit",
    "hqq_4bit": "HQQ 4 bit",
    "hqq_4bit_bfloat16": "HQQ 4 bit, bfloat16",
    "forward_only": "unknown format",
    "forward_only_float16": "unknown format, float16",
    "forward_only_hidden_bias": "unknown format, hidden bias",
    "inference_only": "unknown format without a backward pass",
}
"""The quantised bases of the table of support, by their names in the result file."""


def updated(page: str, file: str) -> str:
    """A page with every generated part made anew.

    Args:
        page: its text.
        file: its path from the repository's root, one of `PAGES`.
    """
    return filled(page, file, PAGES[file]())


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
        (usual, _), *_ = Counter(found.values()).most_common(1)
        return "; ".join([usual, *(f"{base}: {outcome}" for base, outcome in found.items() if outcome != usual)])

    head = ["| | " + " | ".join(OPERATIONS.get(o, o) for o in operations) + " |", "|---|" + "---|" * len(operations)]
    layers = [f"| {name} | " + " | ".join(cell(name, plain, o) for o in operations) + " |" for name in bases]
    linear = [
        f"| {BASES[base]} | " + " | ".join(cell("Linear", [base], o) for o in operations) + " |" for base in others
    ]
    environment = result["environment"]
    return "\n".join(
        [
            f"Every cell is a test for each of {', '.join(plain)} (`benchmarks/results/support.json`; torch "
            f"{environment['torch']}, PEFT {environment['peft']}, transformers {environment['transformers']}, CPU). "
            '"Refused" is an error that says why and leaves the model unchanged; "base cannot" means that the model '
            "cannot do it without an adapter either.",
            "",
            *head,
            *layers,
            "",
            "A linear layer on a quantised base. An unknown format is a layer of which only the forward pass is known:",
            "",
            *head,
            *linear,
            "",
        ]
    )


def conformance(result: dict[str, Any]) -> str:
    """How PEFT's own tests went, in one sentence."""
    return (
        f"PEFT {result['environment']['peft']}'s own tests with DVoRA in their lists "
        f"(`benchmarks/results/conformance.json`): {result['passed']:,} passed, {result['failed']} failed, "
        f"{result['listed']} skipped or expected to fail, each for a listed reason.\n"
    )


def conformance_reasons(result: dict[str, Any]) -> str:
    """Why some of PEFT's own tests do not simply pass, as a table."""
    reasons = sorted(result["reasons"].items(), key=lambda reason: -reason[1])
    lines = ["", "| tests | reason |", "|---|---|", *(f"| {count} | {reason} |" for reason, count in reasons)]
    return conformance(result) + "\n".join(lines) + "\n"


def demo(result: dict[str, Any]) -> str:
    """The demo's table and what it checked."""
    scores, differences = result["scores"], result["largest_logit_difference"]
    environment = result["environment"]
    lines = [
        f"Accuracy on {scores['dvora']['count']:,} movie reviews that were not in the training set "
        f"(`benchmarks/results/demo.json`; torch {environment['torch']}, {environment['threads']} "
        f"threads, seed {result['seed']}, {result['training_seconds']:.0f} s of training):",
        "",
        "| | test accuracy | 95 % interval (Wilson) | trained parameters |",
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
        f"{result['model_bytes'] / 1e6:,.1f} MB. Outputs differ by {differences['fresh_process']:.2g} after loading in "
        f"a fresh process and by {differences['merged']:.2g} after merging into the weights. Both models use the same "
        "kind of head, and DVoRA's starts from the frozen model's. One seed and one data set: a demonstration, not "
        "evidence about the method.",
    ]
    return "\n".join(lines) + "\n"


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _results() -> dict[str, str]:
    made = {"demo": demo(_load("demo")), "users": users(_load("users"))}
    made["reinforcement"] = reinforcement(_load("reinforcement"))
    contents = {name: _load(name) for name in ("quality", "equal_bytes")}
    whole = {name: result_of(content) for name, content in contents.items()}
    for name, parts in (("quality", quality_parts), ("equal_bytes", equal_bytes_parts)):
        content, grid = contents[name], read_grid(FILE.parent / f"{name}.yaml")
        missing = remaining(grid, {row["key"]: row for row in content["rows"]}, list(grid.tasks), list(grid.arms))
        made |= parts(whole[name], content["environment"], missing)
    return made


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "README.md": lambda: {"at-a-glance": at_a_glance(_load("equal_bytes"), _load("speed")["rows"])},
    "CONTRIBUTING.md": lambda: {"conformance": conformance_reasons(_load("conformance"))},
    "benchmarks/README.md": lambda: {
        "targets": targets([*_load("speed")["rows"], *_load("overhead")["rows"]]),
        "start-up": start_up(_load("start_up")),
    },
    "docs/compatibility.md": lambda: {
        "versions": versions(_load("versions")),
        "support": support(_load("support")),
        "conformance": conformance(_load("conformance")),
        "examples": examples(_load("examples")),
    },
    "docs/how-to/train-many-adapters.md": lambda: {"speakers": speakers(_load("speakers"))},
    "docs/how-to/compile.md": lambda: {"compile": compiling(_load("gate"))},
    "docs/how-it-works.md": lambda: {"exactness": exactness(_load("exactness"))},
    "docs/many-adapters.md": lambda: many_adapters_parts(_load("many_adapters")),
    "docs/overhead.md": lambda: overhead(_load("overhead")),
    "docs/results.md": _results,
    "docs/speed.md": lambda: {"gate": gate(_load("gate")), "speed": speed(_load("speed"))},
}
"""The generated parts of every page, by the page's path and the part's name."""


def main() -> None:
    """Rewrite every page in place."""
    for name in PAGES:
        file = ROOT / name
        file.write_text(updated(file.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
