"""High ranks in wider layers: what runs of a model 768 wide say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import read_grid
from benchmarks.quality.page import LABELS, YARDSTICK, gained, heads
from benchmarks.quality.summary import result_of
from benchmarks.speed.metrics import Rows
from benchmarks.tables import kilobytes, table, text

GRID, TASK = Path(__file__).parent / "wider.yaml", "countries"
OVER = (YARDSTICK, "road")
"""What the others are compared with."""
HIGH: Mapping[str, str] = {"r768": "DVoRA r=768, structured", "r1024": LABELS["structured_r1024"]}


def parts(content: Mapping[str, Any], paced: Rows) -> dict[str, str]:
    """The generated parts of the page.

    Args:
        content: of `wider.json`.
        paced: rows of `wider_pace.json`.
    """
    return {"wider": _measured(content, paced)}


def _measured(content: Mapping[str, Any], paced: Rows) -> str:
    result, environment = result_of(content), content["environment"]
    steps = {YARDSTICK: 1.0, **{row["arm"]: row["ratio"][1] for row in paced}}

    def line(arm: str, label: str) -> tuple[str, ...]:
        score, size = result.score(TASK, arm), result.size(TASK, arm, "smallest_bytes")
        assert score is not None
        above = (gained(None if arm == over else result.gain([TASK], arm, over)) for over in OVER)
        step = f"{steps[arm]:.2f}" if arm in steps else ""
        return (label, kilobytes(size), step, f"{score.mean:.1f}", *above)

    labels = {**heads([TASK], read_grid(GRID)), **{arm: LABELS[arm] for arm in OVER}, **HIGH}
    hours = sum(row["seconds"] for row in content["rows"]) / 3600
    return text(
        table(
            ("", "kB, float16", "a step", "test score", "above LoRA r=1", "above RoAd"),
            (line(arm, label) for arm, label in labels.items()),
        ),
        f"all-mpnet-base-v2 (768 wide, twelve blocks) on countries, {len(result.finals(TASK, 'r1024'))} seeds, 500 "
        "steps, four rates each, float32, 95 % intervals. A step: in LoRA r=1's, one thread. "
        f"{hours:.0f} hours of a core (`wider.json`, `wider_pace.json`; torch {environment['torch']}, PEFT "
        f"{environment['peft']}, CPU).",
    )
