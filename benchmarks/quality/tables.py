"""Tables of scores, differences and sizes, for the page "Results"; from the result file."""

from collections.abc import Iterable, Sequence

from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import KINDS, LABELS, Result

REFERENCE = "vera"
MODELS = {"MiniLM": "movie_reviews", "ViT-S/14": "fashion_mnist", "SmolLM2-135M": "shakespeare"}
"""Models and the task whose rows show their sizes."""


def scores(result: Result, question: str, arms: dict[str, str], over: str = REFERENCE) -> list[str]:
    """One row per arm, one column per task with runs for the question: score, and difference to the reference arm."""
    tasks = result.tasks(question)
    present = [arm for arm in arms if any(result.finals(task, arm) for task in tasks)]
    return table(tasks, [(arms[arm], [score_cell(result, task, arm, over) for task in tasks]) for arm in present])


def table(tasks: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """One column per task, one row per label and its cells."""
    head = ["| | " + " | ".join(LABELS[task] for task in tasks) + " |", "|---|" + "---|" * len(tasks)]
    return head + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]


def score_cell(result: Result, task: str, arm: str, over: str) -> str:
    """Score and difference, such as `84.3 (+1.2: 0.4 to 2.0)`; the difference is on the seeds that both have."""
    score = result.score(task, arm)
    if score is None:
        return ""
    digits = 3 if KINDS[task] == "bits" else 1
    shown = f"{score.mean:.{digits}f}"
    gain = None if arm == over else result.gain(task, arm, over)
    if gain is None:
        return shown
    few = result.fewer_seeds(task, arm, over)
    seeds = f"; {few} seed{'s' if few > 1 else ''}" if few else ""
    return f"{shown} ({difference(gain, digits)}{seeds})"


def difference(gain: Interval, digits: int) -> str:
    """A difference and its interval."""
    return f"{gain.mean:+.{digits}f}: {gain.low:+.{digits}f} to {gain.high:+.{digits}f}"


def sizes(result: Result, arms: dict[str, str]) -> list[str]:
    """What an arm trains and stores for each model, and what a step costs."""
    present = {name: task for name, task in MODELS.items() if result.finals(task, REFERENCE)}
    columns = [f"{name}: {what}" for name in present for what in ("parameters", "kB on disk", "step", "memory, MB")]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for arm, label in arms.items():
        cells = [cell for task in present.values() for cell in _size_cells(result, task, arm)]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _size_cells(result: Result, task: str, arm: str) -> Sequence[str]:
    parameters, size = result.size(task, arm, "trained_values"), result.size(task, arm, "saved_bytes")
    own, reference = result.alone(task, arm), result.alone(task, REFERENCE)
    step = memory = ""
    if own and reference:
        step = f"{own['seconds_per_step'] / reference['seconds_per_step']:.2f}"
        memory = f"{(own['peak_bytes'] - own['loaded_bytes']) / 1e6:,.0f}"
    return (
        "" if parameters is None else f"{parameters:,}",
        "" if size is None else f"{size / 1e3:,.0f}",
        step,
        memory,
    )
