"""The README's part on quality and the tables of the page "Results", from the result file."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import ARMS, KINDS, LABELS, Result, result_of

YARDSTICK = "vera"
MODELS = {"MiniLM": "movie_reviews", "ViT-S/14": "fashion_mnist", "SmolLM2-135M": "shakespeare"}
"""Models and the task whose rows show their sizes."""


def quality(content: dict[str, Any]) -> str:
    """Scores of all methods on all tasks, and their differences to VeRA."""
    result, environment = result_of(content), content["environment"]
    lines = [
        f"Test scores, means over seeds (`benchmarks/results/quality.json`, {len(result.rows):,} runs; torch "
        f"{environment['torch']}, PEFT {environment['peft']}, CPU, products in bfloat16). All methods train the same "
        "batches with the same head and schedule; learning rates were tuned for each on validation rows. In brackets: "
        "better (+) or worse than VeRA r=256, with a 95 % interval (paired bootstrap over seeds and test items):",
        "",
        *scores(result, "methods", ARMS),
        "",
        *sizes(result, ARMS),
        "",
    ]
    return "\n".join(lines)


def scores(result: Result, question: str, arms: dict[str, str], over: str = YARDSTICK) -> list[str]:
    """A row an arm, a column a task that tells something of the question: score, and difference to the yardstick."""
    tasks = result.tasks(question)
    present = [arm for arm in arms if any(result.finals(task, arm) for task in tasks)]
    return table(tasks, [(arms[arm], [score_cell(result, task, arm, over) for task in tasks]) for arm in present])


def table(tasks: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A column a task, a row for each label and its cells."""
    head = ["| | " + " | ".join(LABELS[task] for task in tasks) + " |", "|---|" + "---|" * len(tasks)]
    return head + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]


def score_cell(result: Result, task: str, arm: str, over: str) -> str:
    """Score and difference, such as `84.3 (+1.2: 0.4 to 2.0)`; the difference is on the seeds that both have."""
    score = result.score(task, arm)
    if score is None:
        return ""
    digits = 3 if KINDS[task] == "bits" else 1
    told = f"{score.mean:.{digits}f}"
    gain = None if arm == over else result.gain(task, arm, over)
    if gain is None:
        return told
    few = result.fewer_seeds(task, arm, over)
    seeds = f"; {few} seed{'s' if few > 1 else ''}" if few else ""
    return f"{told} ({difference(gain, digits)}{seeds})"


def difference(gain: Interval, digits: int) -> str:
    """A difference and its interval."""
    return f"{gain.mean:+.{digits}f}: {gain.low:+.{digits}f} to {gain.high:+.{digits}f}"


def sizes(result: Result, arms: dict[str, str]) -> list[str]:
    """What an arm trains and keeps in each model, and what a step costs."""
    present = {name: task for name, task in MODELS.items() if result.finals(task, YARDSTICK)}
    columns = [f"{name}: {what}" for name in present for what in ("values", "kB on disk", "step", "memory, MB")]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for arm, label in arms.items():
        cells = [cell for task in present.values() for cell in _size_cells(result, task, arm)]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _size_cells(result: Result, task: str, arm: str) -> Sequence[str]:
    values, size = result.size(task, arm, "trained_values"), result.size(task, arm, "saved_bytes")
    own, yardstick = result.alone(task, arm), result.alone(task, YARDSTICK)
    step = memory = ""
    if own and yardstick:
        step = f"{own['seconds_per_step'] / yardstick['seconds_per_step']:.2f}"
        memory = f"{(own['peak_bytes'] - own['loaded_bytes']) / 1e6:,.0f}"
    return (
        "" if values is None else f"{values:,}",
        "" if size is None else f"{size / 1e3:,.0f}",
        step,
        memory,
    )
