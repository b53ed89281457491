"""Writes the tables of README.md and of the pages from the committed result files, so that no number is typed.

Run from the repository's root: python -m benchmarks.readme
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.compiling import compiling
from benchmarks.examples.table import examples, sixteen, synchronisation
from benchmarks.exporting import parts as exporting
from benchmarks.installation_tables import versions
from benchmarks.many_adapters.tables import parts as many_adapters
from benchmarks.many_adapters.tables import storage
from benchmarks.many_adapters.targets import all_targets as targets_of_many
from benchmarks.quality.depth import parts as depth
from benchmarks.quality.pace import pace
from benchmarks.quality.page import at_a_glance, forms
from benchmarks.quality.page import details as quality_details
from benchmarks.quality.page import parts as quality
from benchmarks.quality.wider import parts as wider
from benchmarks.results import load
from benchmarks.serving.tables import parts as serving
from benchmarks.speakers import table as speakers
from benchmarks.speed.tables import overhead, speed
from benchmarks.speed.targets import all_targets as targets_of_speed
from benchmarks.speed.targets import targets_table
from benchmarks.tables import table, text
from benchmarks.tenants.table import tenants

ROOT = Path(__file__).parent.parent
OPERATIONS = {
    "starts as the base": "equals the base at the start",
    "merge, unmerge": "merge and unmerge",
    "save, load": "save and load",
    "several at once, strength": "several active and their strengths",
    "an adapter a row": "one adapter per row",
}
"""Operations that have another name in the result file."""
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
"""The quantised bases, by their names in the result file."""


def filled(page: str, file: str, parts: dict[str, str]) -> str:
    """A page with the text between the marks of each part put in.

    Args:
        page: its text.
        file: its path from the repository's root.
        parts: by their names.

    Raises:
        ValueError: a part has no marks in the page, or several.
    """
    for name, made in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        page, found = re.subn(pattern, lambda marks, made=made: f"{marks[1]}{made}{marks[2]}", page, flags=re.DOTALL)
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
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        worst = (
            max(e for row in rows if row["dtype"] == dtype for name, e in row["worst"].items() if matches(name))
            for matches in quantities.values()
        )
        lines.append((dtype, *(f"{error:.0e}" for error in worst)))
    return text(
        f"Worst relative error against the dense float64 method ({len(rows)} combinations of size, direction and "
        f"dtype, 1 x 1 to 1536 x 384, ranks 1 to 256, {len(result['seeds'])} seeds; torch {environment['torch']}, CPU, "
        "`benchmarks/results/exactness.json`):",
        table(("dtype", *quantities), lines),
    )


def support(result: dict[str, Any]) -> str:
    """What was tried, and what does not work: layer types on plain bases, then a linear layer on the others."""
    outcomes = {(row["layer"], row["base"], row["operation"]): row["outcome"] for row in result["rows"]}
    operations = list(dict.fromkeys(operation for _, _, operation in outcomes))
    bases = {layer: [base for name, base, _ in outcomes if name == layer] for layer, _, _ in outcomes}
    plain = list(dict.fromkeys(bases["Conv1d"]))
    others = [base for base in dict.fromkeys(bases["Linear"]) if base not in plain]

    def failing(layer: str, chosen: list[str], outcome: str) -> str:
        """The operations with that outcome, and where not all of the bases have it, on which."""
        cells = []
        for operation in operations:
            where = [base for base in chosen if outcomes[layer, base, operation] == outcome]
            only = "" if len(where) == len(chosen) else f" ({', '.join(where)})"
            cells += [f"{OPERATIONS.get(operation, operation)}{only}"] if where else []
        return ", ".join(cells)

    def exceptions(head: str, rows: dict[str, tuple[str, list[str]]]) -> list[str]:
        """A row for all that have the same exceptions; none for what has no exception."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name, (layer, chosen) in rows.items():
            cells = failing(layer, chosen, "refused"), failing(layer, chosen, "the base cannot")
            alike.setdefault(cells, []).append(name)
        return table(
            (head, "refused", "the base cannot either"),
            (("; ".join(names), *cells) for cells, names in alike.items() if any(cells)),
        )

    environment = result["environment"]
    return text(
        f"Each of these operations was tried with each of these layers and bases (`benchmarks/results/support.json`; "
        f"torch {environment['torch']}, PEFT {environment['peft']}, transformers {environment['transformers']}, CPU):",
        [
            f"- **operations:** {'; '.join(OPERATIONS.get(operation, operation) for operation in operations)}",
            f"- **layers**, in {', '.join(plain)}: {'; '.join(bases)}",
        ],
        'All work, but for these, among which are all quantised bases. "Refused" is an error that leaves the model '
        "unchanged; of an unknown format only the forward pass is known.",
        exceptions("layer", {name: (name, plain) for name in bases}),
        exceptions("base of a linear layer", {BASES[base]: ("Linear", [base]) for base in others}),
    )


def conformance(result: dict[str, Any]) -> str:
    """How PEFT's own tests went, in one sentence."""
    return (
        f"PEFT {result['environment']['peft']}'s own tests with DVoRA in their lists "
        f"(`benchmarks/results/conformance.json`): {result['passed']:,} passed, {result['failed']} failed, "
        f"{result['listed']} skipped or expected to fail, each for a listed reason.\n"
    )


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "README.md": lambda: {"at-a-glance": at_a_glance(load("equal_bytes"), load("speed")["rows"], load("pace")["rows"])},
    "benchmarks/README.md": lambda: {
        "targets": text(targets_table(targets_of_speed(load("speed")["rows"]))),
        "many-targets": text(targets_table(targets_of_many(load("many_adapters")["rows"]))),
        "pace": pace(load("pace")),
        **quality_details(load("equal_bytes"), load("pace")["rows"]),
        "where-training-starts": forms(load("heads")),
        "overhead": overhead(load("overhead")),
        "compile": compiling(load("gate")),
        "many-storage": storage(load("many_adapters")),
    },
    "docs/compatibility.md": lambda: {
        "versions": versions(load("versions")),
        "support": support(load("support")),
        "conformance": conformance(load("conformance")),
        "examples": examples(load("examples")),
    },
    "docs/how-to/export.md": lambda: exporting(load("exporting")),
    "docs/how-to/route-messages.md": lambda: {"sixteen": sixteen(load("examples"))},
    "docs/how-it-works.md": lambda: {"exactness": exactness(load("exactness"))},
    "docs/how-to/sync.md": lambda: {"synchronisation": synchronisation(load("examples"))},
    "docs/many-adapters.md": lambda: {
        **many_adapters(load("many_adapters")),
        **serving(load("serving")),
        **depth(load("depth"), load("equal_bytes")),
    },
    "docs/results.md": lambda: {
        **quality(load("equal_bytes"), load("pace")["rows"], load("groups_pace")["rows"]),
        **wider(load("wider"), load("wider_pace")["rows"]),
        "tenants": tenants(load("tenants")),
        "speakers": speakers(load("speakers")),
    },
    "docs/speed.md": lambda: speed(load("speed")),
}
"""The generated parts of every page, by the page's path and the part's name."""


def main() -> None:
    """Rewrite every page in place."""
    for name, made in PAGES.items():
        file = ROOT / name
        file.write_text(filled(file.read_text(encoding="utf-8"), name, made()), encoding="utf-8")


if __name__ == "__main__":
    main()
