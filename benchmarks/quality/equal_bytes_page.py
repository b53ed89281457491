"""The generated parts of docs/results.md that are about the second grid."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.equal_bytes import (
    ARMS,
    GENERATION,
    MAIN,
    TWO,
    YARDSTICK,
    decisions,
    gain,
    half_costs,
    rate_excess,
    schedules,
    smallest_seen,
    table,
    tasks_of,
    tuned_at_an_edge,
    worth_of_tuning,
)
from benchmarks.quality.equal_bytes_settings import lines as settings
from benchmarks.quality.summary import Result, names_of, result_of
from benchmarks.speed.metrics import Rows, time_ratio

EVERYWHERE = ("structured_r256", "structured_r64", "dvora_r256")
"""Arms of which the rates' table is made."""
GLANCE: Mapping[str, tuple[str, str]] = {
    "frozen": ("frozen, best head", ""),
    "magnitude": ("DVoRA, magnitude only", "dvora magnitude"),
    "vera_r256": ("VeRA r=256", "VeRA r=256"),
    "lora_r1": ("LoRA r=1", "LoRA r=1"),
    "structured_r64": ("**DVoRA r=64, structured**", "dvora structured r=64"),
    "structured_r256": ("**DVoRA r=256, structured**", "dvora structured r=256"),
    "lora_r8": ("LoRA r=8", "LoRA r=8"),
}
"""The arms of the README's table: their labels there, and their names in the benchmark of speed."""


def at_a_glance(content: Mapping[str, Any], timed: Rows) -> str:
    """What the main methods store, how good they are on the tasks of all main arms, and what a step takes.

    Args:
        content: of the result file of the grid.
        timed: the rows of the benchmark of speed.
    """
    result, environment = result_of(content), content["environment"]
    tasks = tasks_of(result, MAIN)
    head = ("MiniLM", "trained parameters", "adapter file", "test score", "above LoRA r=1 by", "a training step")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, (label, name) in GLANCE.items():
        cells = [*_glance_cells(result, tasks, arm), _steps(timed, name)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"MiniLM (22.7 million parameters): mean over {len(tasks)} tasks with 24 to 40 classes or a number to "
            f"predict ({names_of(tasks)}), {_seeds(result, tasks)} seeds, differences with 95 % intervals. Every "
            "method had four trials for its learning rate on each task; heads are not counted. A step of 16 x 32 / "
            "64 x 32 tokens, timed in turns, LoRA r=1 = 1 (`benchmarks/results/equal_bytes.json` and `speed.json`; "
            f"torch {environment['torch']}, PEFT {environment['peft']}, CPU).",
            "",
        ]
    )


def parts(result: Result, environment: Mapping[str, Any], missing: int) -> dict[str, str]:
    """The text of every part, by its name.

    Args:
        missing: runs of the grid that have no row yet.
    """
    made = {
        "budget": _budget(result, environment, missing),
        "main": _main(result),
        "two": _two(result),
        "generation": _generation(result),
        "settings": settings(result),
        "decisions": _decisions(result),
    }
    return {f"equal-bytes-{name}": "\n".join([*lines, ""]) for name, lines in made.items()}


def _budget(result: Result, environment: Mapping[str, Any], missing: int) -> list[str]:
    hours = sum(row["seconds"] for row in result.rows) / 3600
    finals = sum(row["stage"] == "final" for row in result.rows)
    return [
        f"{len(result.rows):,} runs so far, {finals} of them evaluated on a test split; {hours:.1f} hours of one core "
        f"each (torch {environment['torch']}, PEFT {environment['peft']}, {environment['cores']} cores, one thread a "
        f"run, `benchmarks/results/equal_bytes.json`)."
        + (f" **{missing:,} runs of the grid are missing.**" if missing else "")
    ]


def _main(result: Result) -> list[str]:
    tasks = tasks_of(result, MAIN)
    if not tasks:
        return ["No task has runs of all main arms yet."]
    seen = [smallest_seen(found) for arm in MAIN if arm != YARDSTICK and (found := gain(result, tasks, arm))]
    return [
        *table(result, tasks),
        "",
        f"Means over {names_of(tasks)}; {_seeds(result, tasks)} seeds. The smallest difference to LoRA r=1 "
        f"that this design sees with a probability of 80 %: {min(seen):.1f} to {max(seen):.1f} points.",
    ]


def _two(result: Result) -> list[str]:
    tasks = tasks_of(result, TWO)
    return table(result, tasks) if tasks else ["No task has runs of all arms yet."]


def _glance_cells(result: Result, tasks: Sequence[str], arm: str) -> Sequence[str]:
    parameters, size = (result.size(tasks[0], arm, what) for what in ("trained_values", "saved_bytes"))
    scores = [score.mean for task in tasks if (score := result.score(task, arm))]
    found = None if arm == YARDSTICK else gain(result, tasks, arm)
    return (
        "" if parameters is None else f"{parameters:,}",
        "" if size is None else f"{size / 1e3:,.0f} kB",
        f"{sum(scores) / len(scores):.1f}",
        "" if found is None else f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})",
    )


def _steps(timed: Rows, arm: str) -> str:
    """The time of a step of MiniLM in LoRA r=1's, with few tokens and with many."""
    setting = {"part": "training", "workload": "minilm", "dtype": "float32"}
    found = [time_ratio(timed, arm, "LoRA r=1", batch=batch, **setting) for batch in (16, 64)]
    return " / ".join(f"{ratio.median:.2f}" for ratio in found if ratio is not None)


def _seeds(result: Result, tasks: Sequence[str]) -> str:
    """How many seeds the main arms have, such as "5" or "2 to 5"."""
    counts = {len(result.finals(task, arm)) for task in tasks for arm in MAIN}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _generation(result: Result) -> list[str]:
    tasks = tasks_of(result, GENERATION, generated=True)
    return table(result, tasks) if tasks else ["These runs are missing."]


def _decisions(result: Result) -> list[str]:
    tasks = tasks_of(result, MAIN)
    if not tasks:
        return ["Nothing is decided yet."]
    lines = [*decisions(result, tasks), *schedules(result), *worth_of_tuning(result)]
    for arm in EVERYWHERE:
        lost = ", ".join(f"{rate:g}: {share:.0%}" for rate, share in rate_excess(result, tasks, arm).items())
        if lost:
            lines.append(f"- {ARMS[arm].label}, what a rate loses of what tuning gains (validation loss): {lost}")
    if costs := [cost for arm in ARMS if (cost := half_costs(result, tasks, arm)) is not None]:
        lines.append(
            f"- float16 in place of float32 in the file changes a score by {min(-cost for cost in costs):+.2f} to "
            f"{max(-cost for cost in costs):+.2f} points (seed 0)"
        )
    if edges := tuned_at_an_edge(result):
        lines.append(f"- The best trial had the lowest or the highest rate: {'; '.join(edges)}")
    return [f"Over {names_of(tasks)}:", "", *lines]
