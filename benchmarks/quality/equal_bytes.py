"""What DVoRA is worth at its size: scores against bytes, and the decisions that follow from them by rule.

The rules were written down before the runs (`benchmarks/LOG.md`, 2026-11-28). Pure functions of the rows of
`equal_bytes.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import LABELS, Result, name_of
from benchmarks.quality.tables import difference

YARDSTICK = "lora_r1"
MAIN = ("structured_r64", "structured_r256", "dvora_r256", "lora_r1", "lora_r8", "vera_r256", "magnitude", "ia3")
"""Arms that run on every task; a task is counted as soon as it has runs of all of them."""
TWO = (*MAIN, "dora_r1", "bitfit", "lora_r16")
"""Likewise, for the tasks on which every arm runs."""
GENERATION = ("structured_r64", "lora_r1", "lora_r8", "vera_r256", "magnitude")
"""Arms that run on the task of generation, which is shown for itself."""
GENERATED = ("cron_expressions",)
MARGIN = 0.3
"""Points by which a cheaper choice may be worse, at most, to become the default."""
WITH_DEFAULTS = ("structured_r64", "lora_r8")
"""Arms that also run with the default rate of their method."""
LINEAR = "structured_r64_linear"
SCHEDULES: Mapping[str, str] = {
    "cosine": "structured_r64",
    "constant": "structured_r64_constant",
    "constant, half of the rate": "structured_r64_constant_half",
}
"""Arms whose rate falls otherwise than in a line, as that of `dvora train` does."""
SEEN = 2.8
"""Standard errors of the smallest difference that is found with a probability of 80 % at a level of 5 %."""


@dataclass(frozen=True)
class Shown:
    """An arm in the table and the picture."""

    method: str
    label: str


ARMS: Mapping[str, Shown] = {
    "structured_r16": Shown("DVoRA, structured", "DVoRA r=16, structured"),
    "structured_r64": Shown("DVoRA, structured", "DVoRA r=64, structured"),
    "structured_r256": Shown("DVoRA, structured", "DVoRA r=256, structured"),
    "structured_r1024": Shown("DVoRA, structured", "DVoRA r=1024, structured"),
    "structured_r64_attention": Shown("DVoRA, structured", "DVoRA r=64, structured, attention"),
    "structured_r64_query_value": Shown("DVoRA, structured", "DVoRA r=64, structured, query and value"),
    "dvora_r16": Shown("DVoRA", "DVoRA r=16, dense"),
    "dvora_r64": Shown("DVoRA", "DVoRA r=64, dense"),
    "dvora_r256": Shown("DVoRA", "DVoRA r=256, dense"),
    "magnitude": Shown("magnitude only", "magnitude only"),
    "vera_r256": Shown("VeRA", "VeRA r=256"),
    "lora_r1": Shown("LoRA", "LoRA r=1"),
    "lora_r2": Shown("LoRA", "LoRA r=2"),
    "lora_r4": Shown("LoRA", "LoRA r=4"),
    "lora_r8": Shown("LoRA", "LoRA r=8"),
    "lora_r16": Shown("LoRA", "LoRA r=16"),
    "rslora_r16": Shown("LoRA", "rsLoRA r=16"),
    "lora_query_value_r1": Shown("LoRA, query and value", "LoRA r=1, query and value"),
    "lora_query_value_r4": Shown("LoRA, query and value", "LoRA r=4, query and value"),
    "lora_query_value_r16": Shown("LoRA, query and value", "LoRA r=16, query and value"),
    "dora_r1": Shown("DoRA", "DoRA r=1"),
    "dora_r8": Shown("DoRA", "DoRA r=8"),
    "ia3": Shown("(IA)3", "(IA)3, all linear layers"),
    "bitfit": Shown("BitFit", "BitFit"),
    "vblora": Shown("VB-LoRA", "VB-LoRA"),
    "unilora_4096": Shown("Uni-LoRA", "Uni-LoRA, 4,096"),
    "unilora_32768": Shown("Uni-LoRA", "Uni-LoRA, 32,768"),
    "randlora": Shown("RandLoRA", "RandLoRA r=192"),
    "full": Shown("full fine-tuning", "full fine-tuning"),
}
"""Every arm that is compared, in the order of the tables."""


def tasks_of(result: Result, arms: Sequence[str], generated: bool = False) -> list[str]:
    """The tasks on which all of these arms have final runs, in the order of `LABELS`.

    Args:
        generated: those whose answers are generated, or the others.
    """
    some = [task for task in LABELS if (task in GENERATED) == generated]
    return [task for task in some if all(result.finals(task, arm) for arm in arms)]


def arms_of(result: Result, tasks: Sequence[str]) -> list[str]:
    """The compared arms that have final runs on all of these tasks."""
    return [arm for arm in ARMS if all(result.finals(task, arm) for task in tasks)]


def gain(result: Result, tasks: Sequence[str], arm: str, over: str = YARDSTICK) -> Interval | None:
    """How many points an arm is above another, as a mean over tasks."""
    return result.mean_gain([(task, arm, over) for task in tasks])


def smallest_seen(interval: Interval) -> float:
    """The difference that a comparison with this interval finds with a probability of 80 %."""
    return SEEN * (interval.high - interval.low) / (2 * 1.96)


def smallest_bytes(result: Result, task: str, arm: str) -> int:
    """Bytes of the adapter's file in float16, without matrices that a seed would give."""
    size = result.size(task, arm, "smallest_bytes")
    assert size is not None
    return size


def half_costs(result: Result, tasks: Sequence[str], arm: str) -> float | None:
    """Points that are lost when the trained values are rounded to float16, a mean over tasks (seed 0)."""
    rows = [result.finals(task, arm).get(0) for task in tasks]
    losses = [
        100 * (row["test"]["score"] - row["test_in_half"]["score"]) for row in rows if row and "test_in_half" in row
    ]
    return float(np.mean(losses)) if len(losses) == len(tasks) > 0 else None


def is_not_worse(interval: Interval) -> bool:
    """Whether the cheaper choice may become the default: not below the other by more than the margin."""
    return interval.low > -MARGIN


def rate_excess(result: Result, tasks: Sequence[str], arm: str) -> dict[float, float]:
    """By the adapter's rate, how much of what tuning gained is lost with it: means, for rates tried on every task."""
    lost: dict[float, list[float]] = {}
    for task in tasks:
        for rate, share in result.lost(task, arm).items():
            lost.setdefault(rate, []).append(share)
    return {rate: float(np.mean(each)) for rate, each in sorted(lost.items()) if len(each) == len(tasks)}


def tuned_at_an_edge(result: Result) -> list[str]:
    """Arms and tasks whose best trial has the lowest or the highest rate of all that were tried."""
    found = []
    for task in LABELS:
        for arm, shown in ARMS.items():
            trials = result.trials(task, arm) if _tried(result, task, arm) else []
            losses = [loss for _, loss in trials]
            if len(losses) > 3 and losses.index(min(losses)) in (0, len(losses) - 1):
                found.append(f"{shown.label} on {name_of(task)}")
    return found


def table(result: Result, tasks: Sequence[str]) -> list[str]:
    """One row per arm with runs on all of the tasks: bytes, the mean gain over the yardstick, and each task's score."""
    names = [name_of(task) for task in tasks]
    head = ["", "parameters", "kB as PEFT saves it", "kB, float16, no seeded matrices", "points above LoRA r=1", *names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + [
        f"| {' | '.join(_cells(result, tasks, arm))} |"
        for arm in sorted(arms_of(result, tasks), key=lambda each: smallest_bytes(result, tasks[0], each))
    ]


def decisions(result: Result, tasks: Sequence[str]) -> list[str]:
    """What the rules say: the kind of matrices, the rank, and the rate."""
    lines = []
    kind = gain(result, tasks, "structured_r256", "dvora_r256")
    if kind is not None:
        lines.append(_verdict("structured minus dense, rank 256", kind, "structured is the default", "dense stays it"))
    for label, arms in (
        ("structured, rank 64 minus rank 256", ("structured_r64", "structured_r256")),
        ("dense, rank 64 minus rank 256", ("dvora_r64", "dvora_r256")),
    ):
        rank = gain(result, tasks, *arms)
        if rank is not None:
            lines.append(_verdict(label, rank, "64 is as good", "64 is not shown to be as good"))
    return lines


def schedules(result: Result) -> list[str]:
    """What other schedules gain over a rate that falls in a line."""
    lines = []
    for label, arm in SCHEDULES.items():
        tasks = tasks_of(result, (arm, LINEAR))
        if tasks and (found := gain(result, tasks, arm, LINEAR)) is not None:
            holds = f"{label} becomes" if found.low > 0 else "linear stays"
            lines.append(f"- schedule, {label} minus linear: {difference(found, 2)}; {holds} the default")
    return lines


def worth_of_tuning(result: Result) -> list[str]:
    """What the four trials of tuning gain over the method's default rate."""
    lines = []
    for tuned in WITH_DEFAULTS:
        tasks = tasks_of(result, (tuned, f"{tuned}_default"))
        if tasks and (found := gain(result, tasks, tuned, f"{tuned}_default")) is not None:
            lines.append(f"- {ARMS[tuned].label}, four trials minus the default rate: {difference(found, 2)}")
    return lines


def _verdict(label: str, interval: Interval, holds: str, fails: str) -> str:
    return f"- {label}: {difference(interval, 2)}; {holds if is_not_worse(interval) else fails}"


def _cells(result: Result, tasks: Sequence[str], arm: str) -> list[str]:
    found = gain(result, tasks, arm)
    scores = [result.score(task, arm) for task in tasks]
    return [
        ARMS[arm].label,
        f"{result.size(tasks[0], arm, 'trained_values'):,}",
        f"{(result.size(tasks[0], arm, 'saved_bytes') or 0) / 1e3:,.0f}",
        f"{smallest_bytes(result, tasks[0], arm) / 1e3:,.0f}",
        "" if found is None or arm == YARDSTICK else difference(found, 1),
        *("" if score is None else f"{score.mean:.1f}" for score in scores),
    ]


def _tried(result: Result, task: str, arm: str) -> bool:
    return any((row["task"], row["arm"], row["stage"]) == (task, arm, "trial") for row in result.rows)
