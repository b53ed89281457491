"""The generated parts of docs/results.md: one table a question."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.quality.summary import ARMS, CHOICES, EQUAL_VALUES, KINDS, QUANTISED, RANKS, SEEDS, Result
from benchmarks.quality.tables import MODELS, REFERENCE, difference, score_cell, scores, sizes, table

TRAINED = {name: label for name, label in ARMS.items() if name not in ("majority", "tfidf", "frozen")}


def parts(result: Result, environment: Mapping[str, Any], missing: int) -> dict[str, str]:
    """The text of every part, by its name.

    Args:
        missing: runs of the grid that have no row yet.
    """
    made: dict[str, Callable[[], list[str]]] = {
        "budget": lambda: budget(result, environment, missing),
        "scores": lambda: scores(result, "methods", ARMS),
        "means": lambda: means(result),
        "sizes": lambda: [*sizes(result, ARMS), *smallest_lora(result)],
        "equal": lambda: scores(result, "equal_values", EQUAL_VALUES, "dvora"),
        "ranks": lambda: scores(result, "ranks", RANKS, "dvora"),
        "choices": lambda: scores(result, "choices", {"dvora": "default", **CHOICES}, "dvora"),
        "rates": lambda: rates(result),
        "stability": lambda: stability(result),
        "long": lambda: long(result),
        "quantised": lambda: scores(result, "quantised", QUANTISED, "dvora"),
        "seeds": lambda: seeds(result),
        "failures": lambda: failures(result),
    }
    return {f"quality-{name}": "\n".join([*make(), ""]) for name, make in made.items()}


def budget(result: Result, environment: Mapping[str, Any], missing: int) -> list[str]:
    """How many runs of which kind, what they took, and how many are missing."""
    stages = [row["stage"] for row in result.rows]
    hours = sum(row["seconds"] for row in result.rows) / 3600
    return [
        f"{len(stages):,} runs: {stages.count('trial')} to tune learning rates, {stages.count('final')} evaluated on "
        f"the test split, {stages.count('alone')} for time and memory; {hours:.1f} hours of one core each. Python "
        f"{environment['python']}, torch {environment['torch']}, PEFT {environment['peft']}, transformers "
        f"{environment['transformers']}, {environment['cores']} cores, one thread a run.",
        *([f"\n**The grid is not finished: {missing:,} of its runs are missing.**"] if missing else []),
    ]


def means(result: Result) -> list[str]:
    """Mean differences to VeRA over the tasks that are scored in points."""
    points = [task for task in result.tasks("methods") if KINDS[task] != "bits"]
    longer = [task for task in points if task in result.tasks("long")]
    lines = [f"| | short, {len(points)} tasks | four times as long, {len(longer)} tasks |", "|---|---|---|"]
    for arm, label in TRAINED.items():
        short = result.mean_gain([(task, arm, REFERENCE) for task in points])
        pairs = [(task, *pair) for task in longer if (pair := _better_rates(result, task, arm))]
        long = result.mean_gain(pairs) if len(pairs) == len(longer) else None
        if arm != REFERENCE and (short or long):
            cells = ["" if each is None else difference(each, 1) for each in (short, long)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def smallest_lora(result: Result) -> list[str]:
    """What LoRA r=1 would train of the models that it was not run on: its parameters are proportional to the rank."""
    not_run = [
        f"{eight // 8:,} parameters of {name}"
        for name, task in MODELS.items()
        if (eight := result.size(task, "lora_r8", "trained_values")) and not result.finals(task, "lora_r1")
    ]
    return ["", f"LoRA r=1 was run on MiniLM only; it would train {' and '.join(not_run)}."] if not_run else []


def rates(result: Result) -> list[str]:
    """The tuned rates: adapter, and magnitude where it has one."""
    tasks = result.tuned_tasks()
    return table(tasks, [(label, [_rates_cell(result, task, arm) for task in tasks]) for arm, label in TRAINED.items()])


def stability(result: Result) -> list[str]:
    """Standard deviation over seeds, and how wide the plateau of learning rates is."""
    tasks = result.tuned_tasks()
    return table(
        tasks, [(label, [_stability_cell(result, task, arm) for task in tasks]) for arm, label in TRAINED.items()]
    )


def long(result: Result) -> list[str]:
    """Four times as many steps: each method with the better of two rates by validation loss, then everything."""
    methods = {arm: ARMS[arm] for arm in ("lora_r8", "vera", "dvora")}
    tasks = result.tasks("long")
    better = [(label, [_long_cell(result, task, arm) for task in tasks]) for arm, label in methods.items()]
    endings = {"": "", "_long": ", four times as long", "_long_third": ", four times as long, a third of the rates"}
    arms = {f"{arm}{ending}": label + text for arm, label in methods.items() for ending, text in endings.items()}
    heading = "All of these runs, with differences to VeRA's longer runs with the tuned rates:"
    return [*table(tasks, better), "", heading, "", *scores(result, "long", arms, "vera_long")]


def seeds(result: Result) -> list[str]:
    """Standard deviations over the shared matrices, and over the order of the batches."""
    tasks = result.tasks("seeds")
    spreads = [(label, [result.spread(task, arm, first) for task in tasks]) for arm, (label, first) in SEEDS.items()]
    return table(tasks, [(label, ["" if each is None else f"{each:.2f}" for each in some]) for label, some in spreads])


def failures(result: Result) -> list[str]:
    """Runs that raised an error or diverged, and trials that ended worse than they began."""
    lines = [f"- `{row['key']}`: {row.get('error', 'diverged')}" for row in result.failed()]
    worse = result.worse_than_the_start()
    lines.append(f"- {len(worse)} trials ended with a higher validation loss than the frozen model's.")
    return lines


def _rates_cell(result: Result, task: str, arm: str) -> str:
    row = next(iter(result.finals(task, arm).values()), None)
    if row is None:
        return ""
    magnitude = row["rates"]["magnitude"]
    return f"{row['rates']['adapter']:.2g}" + ("" if magnitude is None else f", magnitude {magnitude:.2g}")


def _long_cell(result: Result, task: str, arm: str) -> str:
    pair = _better_rates(result, task, arm)
    return score_cell(result, task, *pair) if pair else ""


def _better_rates(result: Result, task: str, arm: str) -> tuple[str, str] | None:
    """Of the longer runs of an arm and of VeRA those with the lower validation loss."""
    ours, theirs = (result.lowest_loss(task, (f"{each}_long", f"{each}_long_third")) for each in (arm, REFERENCE))
    return (ours, theirs) if ours and theirs else None


def _stability_cell(result: Result, task: str, arm: str) -> str:
    spread, plateau = result.spread(task, arm), result.plateau(task, arm)
    shown = "" if spread is None else f"{spread:.2f}" if KINDS[task] != "bits" else f"{spread:.4f}"
    if plateau is None:
        return shown
    factor, ends = plateau
    return f"{shown}, rates x {'' if ends else '> '}{factor:.0f}"
