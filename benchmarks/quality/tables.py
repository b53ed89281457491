"""Tables of scores, differences and sizes, for the README and the page "Results"; from the result file."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import ARMS, KINDS, LABELS, Result, result_of

REFERENCE = "vera"
MODELS = {"MiniLM": "movie_reviews", "ViT-S/14": "fashion_mnist", "SmolLM2-135M": "shakespeare"}
"""Models and the task whose rows show their sizes."""
OURS = "dvora"
GLANCE = {arm: ARMS[arm] for arm in ("full", "lora_r8", "lora_r1", "vera")} | {OURS: "**DVoRA r=256**"}
GLANCE_TASKS = ("movie_reviews", "tweets", "wordnet10")
"""Those on which all methods of the README's table were trained."""


def at_a_glance(content: dict[str, Any]) -> str:
    """Five methods on MiniLM: what they train and store, how good they are, and what a step takes."""
    result, environment = result_of(content), content["environment"]
    tasks = [task for task in GLANCE_TASKS if result.finals(task, OURS)]
    names = ", ".join(LABELS[task].partition(",")[0] for task in tasks)
    head = ("MiniLM", "trained parameters", "adapter file", "accuracy, %", "DVoRA better by", "training step")
    lines = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {label} | {' | '.join(_glance_cells(result, tasks, arm))} |" for arm, label in GLANCE.items()),
        "",
        f"MiniLM (22.7 million parameters): mean test accuracy over {names}, differences with 95 % intervals, and "
        "the time of a step in units of LoRA r=8's. Learning rates were tuned for each method; heads are not counted "
        f"(`benchmarks/results/quality.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU).",
    ]
    return "\n".join(lines) + "\n"


def _glance_cells(result: Result, tasks: Sequence[str], arm: str) -> Sequence[str]:
    model = MODELS["MiniLM"]
    parameters, size = result.size(model, arm, "trained_values"), result.size(model, arm, "saved_bytes")
    means = [score.mean for task in tasks if (score := result.score(task, arm))]
    gain = None if arm == OURS else result.mean_gain([(task, OURS, arm) for task in tasks])
    step, unit = result.step(model, arm), result.step(model, "lora_r8")
    return (
        "" if parameters is None else f"{parameters:,}",
        "" if size is None else f"{size / 1e3:,.0f} kB",
        f"{sum(means) / len(means):.1f}" if means else "",
        "" if gain is None else f"{gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})",
        "" if step is None or unit is None else f"{step / unit:.2f}",
    )


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
