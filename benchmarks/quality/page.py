"""The generated parts of docs/results.md and the table at a glance, from `equal_bytes.json`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.grid import Grid, read_grid
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import NAMES, Result, result_of
from benchmarks.speed.metrics import Rows, time_ratio
from benchmarks.tables import kilobytes, points, span, table, text

YARDSTICK = "lora_r1"
LABELS: Mapping[str, str] = {
    "full": "full fine-tuning",
    "rslora_r16": "rsLoRA r=16",
    "lora_r16": "LoRA r=16",
    "dora_r8": "DoRA r=8",
    "lora_r8": "LoRA r=8",
    "lora_r4": "LoRA r=4",
    "lora_r2": "LoRA r=2",
    "lora_r1": "LoRA r=1",
    "dora_r1": "DoRA r=1",
    "structured_r4096": "DVoRA r=4096, structured",
    "structured_r1024": "DVoRA r=1024, structured",
    "groups_r16_g64": "DVoRA r=16, 64 groups",
    "groups_r64_g64": "DVoRA r=64, 64 groups",
    "structured_r384": "DVoRA r=384, structured",
    "structured_r256": "DVoRA r=256, structured",
    "dvora_r256": "DVoRA r=256, dense",
    "structured_r64": "DVoRA r=64, structured",
    "structured_r16": "DVoRA r=16, structured",
    "randlora": "RandLoRA r=192",
    "vera_r256": "VeRA r=256",
    "magnitude": "magnitude only",
    "ia3": "(IA)3, all linear layers",
    "hyperadapt": "HyperAdapt",
    "road": "RoAd",
    "road_4": "RoAd, variant 4",
    "bitfit": "BitFit",
    "ln_tuning": "layer norms alone",
    "lokr": "LoKr r=16",
    "oft": "OFT, blocks of 4",
    "c3a": "C3A, blocks of 192",
    "shira": "SHiRA r=1",
    "shira_r2": "SHiRA r=2",
    "shira_r4": "SHiRA r=4",
    "shira_r8": "SHiRA r=8",
    "fourierft": "FourierFT, 1,152",
    "tinylora": "TinyLoRA r=32",
    "vblora": "VB-LoRA",
    "unilora_32768": "Uni-LoRA, 32,768",
    "unilora_4096": "Uni-LoRA, 4,096",
    "structured_r64_attention": "DVoRA r=64, structured, attention",
    "structured_r64_query_value": "DVoRA r=64, structured, query and value",
    "lora_query_value_r16": "LoRA r=16, query and value",
    "lora_query_value_r1": "LoRA r=1, query and value",
}
"""Every arm that is compared; baselines and runs in other settings have their own tables."""
HEADS: Mapping[str, str] = {"frozen": "frozen, head of {} rows", "frozen_all_rows": "frozen, head of all {} rows"}
"""Arms without an adapter: the head that every method starts from, and one that has read its rows and the batches'."""
MAIN = (
    *("ia3", "magnitude", "hyperadapt", "road", "shira", "vera_r256", "lora_r1"),
    *("structured_r64", "structured_r256", "dvora_r256", "structured_r1024"),
    *("road_4", "shira_r2", "lora_r2", "lora_r4", "lora_r8"),
)
"""Arms that run on every task but the generated one; a task is counted as soon as it has runs of all of them."""
FEW = (*MAIN, "dora_r1", "bitfit", "lora_r16")
"""Likewise, for the tasks on which every arm runs."""
GENERATED = ("magnitude", "vera_r256", "lora_r1", "structured_r64", "lora_r8")
GLANCE: Mapping[str, tuple[str, str]] = {
    "road": ("RoAd (pairs of rows)", "RoAd"),
    "shira_r2": ("SHiRA r=2 (random entries)", ""),
    "vera_r256": ("VeRA r=256", "VeRA r=256"),
    "lora_r1": ("LoRA r=1", "LoRA r=1"),
    "structured_r64": ("**DVoRA r=64, structured**", "dvora structured r=64"),
    "structured_r256": ("**DVoRA r=256, structured**", "dvora structured r=256"),
    "structured_r1024": ("**DVoRA r=1024, structured**", "dvora structured r=1024"),
    "lora_r8": ("LoRA r=8", "LoRA r=8"),
}
"""The adapters of the table at a glance: their labels there, and their names in the benchmark of speed."""


class Setting(NamedTuple):
    """How the arms of a column were trained; of several endings of an arm's name the lower validation loss counts."""

    label: str
    endings: tuple[str, ...]
    of_heads: str = ""


USUAL, TWICE = Setting("500 steps", ("",)), Setting("1,000 steps", ("_twice", "_twice_half"))
SETTINGS = (
    USUAL,
    TWICE,
    Setting("base in nf4, 1,000 steps", ("_nf4",), "_nf4"),
    Setting("base fine-tuned before", ("_continued",), "_continued"),
)
LENGTHS: Mapping[str, tuple[str, ...]] = {
    "lora_r1": ("lora_r1", "lora_r1_time_500"),
    "hyperadapt": ("hyperadapt", "hyperadapt_time_500"),
    "road": ("road", "road_time_500"),
    "structured_r64": ("structured_r64",),
    "structured_r256": ("structured_r256_time_500", "structured_r256"),
    "lora_r8": ("lora_r8",),
}
"""Runs of several lengths, by the arm whose step takes as long as theirs."""
MATCHED = "lora_r1_time_500"
"""The run whose time the table at a glance compares in."""
RIVALS: Mapping[str, str] = {
    "structured_r64": MATCHED,
    "structured_r256_time_500": MATCHED,
    "hyperadapt_time_500": MATCHED,
    "road_time_500": MATCHED,
}
"""The run of LoRA r=1 that takes as long."""
HIGH, IN_ITS_TIME = "structured_r1024", "_time_1024"
AS_LONG = ("lora_r1", "road", "structured_r256", "road_4", "lora_r4", "lora_r8")
"""Arms that were also trained for as long as 500 steps of `HIGH` take."""
BESIDE = ("lora_r2", "shira", "shira_r2")
"""Others that stand beside it."""
GROUPS = ("groups_r16_g64", "groups_r64_g64")
BESIDE_GROUPS = (
    *("lora_r1", "structured_r64", "structured_r1024", *GROUPS),
    *("road", "road_4", "shira_r2", "lora_r2", "lora_r4", "lora_r8"),
)
"""What lambda_d by groups is compared with."""
IN_TIME_OF_GROUPS = "_time_groups"
"""Of runs as long as 500 steps of rank 64 with 64 groups take."""
PARTS: Mapping[str, str] = {
    "columns": "columns",
    "magnitude": "rows",
    "low_rank": "low rank",
    "hyperadapt": "rows and columns (HyperAdapt)",
    "rows_low_rank": "rows and low rank",
    "structured_r64": "rows and low rank, renormalised (DVoRA)",
    "rows_columns_low_rank": "rows, columns and low rank",
}
"""Arms that train one or several parts of the method; low rank is r=64 with structured matrices."""
IN_SETTINGS = ("structured_r64", "dvora_r256", "vera_r256", "lora_r8")


def parts(content: Mapping[str, Any], paced: Rows, groups_paced: Rows) -> dict[str, str]:
    """The text of every part of the page that is about these runs, by its name.

    Args:
        content: of the result file `equal_bytes.json`.
        paced: the rows of `pace.json`.
        groups_paced: those of `groups_pace.json`, of other turns.
    """
    result = result_of(content)
    return {
        "equal-bytes": _main(result, content["environment"]),
        "equal-time": _equal_time(result, paced),
        "high-rank": _high_rank(result, paced),
        "groups": _groups(result, groups_paced),
        "settings": _settings(result),
    }


def at_a_glance(content: Mapping[str, Any], speeds: Rows, paced: Rows) -> str:
    """What the main methods store, how good they are on the tasks of all main arms, and what a step takes.

    Args:
        content: of the result file of the grid.
        speeds: the rows of the benchmark of speed.
        paced: those of the grid's own steps.
    """
    result, environment = result_of(content), content["environment"]
    tasks = result.tasks(*MAIN)
    head = ("MiniLM", "adapter file", "test score", "above LoRA r=1 by", "in equal time", "a step")
    lines = over_time(result, paced)
    rows = [
        (label, "", f"{_mean_score(result, tasks, arm):.1f}", _above(result, tasks, arm), "", "")
        for arm, label in heads(tasks, read_grid()).items()
    ]
    for arm, (label, name) in GLANCE.items():
        saved = kilobytes(result.size(tasks[0], arm, "saved_bytes"))
        rows.append(
            (
                *(label, f"{saved} kB" if saved else ""),
                *(f"{_mean_score(result, tasks, arm):.1f}", _above(result, tasks, arm)),
                *(_in_time(lines.get(arm, ())), _steps(speeds, name, paced, arm)),
            )
        )
    return text(
        table(head, rows),
        f"Mean over {len(tasks)} tasks and {_seeds(result, tasks)} seeds with 95 % intervals, each method at its best "
        "of four learning rates; sizes without heads. All start from the first head; the second has read all of their "
        "rows. In equal time: both as long as 500 steps of DVoRA r=64 take. A step, in LoRA r=1's: of 16 x 32 tokens "
        "in float32 / of these tasks in bfloat16 "
        "(`benchmarks/results/equal_bytes.json`, `speed.json` and `pace.json`; "
        f"torch {environment['torch']}, PEFT {environment['peft']}, CPU).",
    )


def gained(gain: Interval | None) -> str:
    """A gain and its interval; nothing where there is none."""
    return "" if gain is None else points(gain.mean, gain)


def heads(tasks: Sequence[str], grid: Grid) -> dict[str, str]:
    """The labels of `HEADS`, with the fewest and the most rows that a task's head is fitted to."""
    return {arm: label.format(span(grid.plan(task, arm).train for task in tasks)) for arm, label in HEADS.items()}


def size_of(result: Result, task: str, arm: str) -> int:
    """Bytes of the adapter in float16, without matrices that a seed would give."""
    size = result.size(task, arm, "smallest_bytes")
    assert size is not None, (task, arm)
    return size


def _main(result: Result, environment: Mapping[str, Any]) -> str:
    tasks = result.tasks(*MAIN)
    hours = sum(row["seconds"] for row in result.rows) / 3600
    labels = heads(tasks, read_grid()) | {arm: LABELS[arm] for arm in MAIN}
    return text(
        table(
            ("", "file, kB", "kB, float16", "points above LoRA r=1", "over tasks", *(NAMES[task] for task in tasks)),
            (
                (
                    *(label, kilobytes(result.size(tasks[0], arm, "saved_bytes"))),
                    *(kilobytes(result.size(tasks[0], arm, "smallest_bytes")), _above(result, tasks, arm)),
                    _over_tasks(result, tasks, arm),
                    *(f"{_score(result, task, arm):.1f}" for task in tasks),
                )
                for arm, label in labels.items()
            ),
        ),
        f"Test scores of MiniLM, {_seeds(result, tasks)} seeds, 95 % intervals of the mean over these tasks; over "
        "tasks: of what other tasks would give, if these are drawn from them (Student's t). File: as PEFT saves it "
        "(of HyperAdapt its values). float16: "
        f"without matrices that a seed gives. {len(result.rows):,} runs, {hours:.0f} hours of a core "
        f"(`benchmarks/results/equal_bytes.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU).",
    )


class Timed(NamedTuple):
    """Runs of one length: their steps (the fewest and the most of a task), their time, and how good they are.

    Time is in that of LoRA r=1's 500 steps, a mean over tasks.
    """

    arm: str
    steps: tuple[int, int]
    time: float
    above: Interval
    in_time: Interval | None


def over_time(result: Result, paced: Rows) -> dict[str, list[Timed]]:
    """By method, its runs of every length that all tasks have, from the shortest to the longest.

    Args:
        paced: rows of `pace.json`.
    """
    pace = {(row["task"], row["arm"]): row["ratio"][1] for row in paced if row["dtype"] == "bfloat16"}
    tasks = result.tasks(*MAIN)
    lines: dict[str, list[Timed]] = {}
    for method, arms in LENGTHS.items():
        for arm in arms:
            if result.tasks(arm) != tasks:
                continue
            counts = [result.steps(task, arm) for task in tasks]
            usual = [result.steps(task, YARDSTICK) for task in tasks]
            times = [
                count * (1 if method == YARDSTICK else pace[task, method]) / unit
                for task, count, unit in zip(tasks, counts, usual, strict=True)
            ]
            above = Interval(0, 0, 0) if arm == YARDSTICK else result.gain(tasks, arm, YARDSTICK)
            assert above is not None
            rival = RIVALS.get(arm)
            in_time = result.gain(tasks, arm, rival) if rival and result.tasks(rival) == tasks else None
            found = Timed(arm, (min(counts), max(counts)), float(np.mean(times)), above, in_time)
            lines.setdefault(method, []).append(found)
    return lines


def _equal_time(result: Result, paced: Rows) -> str:
    rows = [
        (
            *(LABELS[method], span(each.steps), f"{each.time:.2f}"),
            *(gained(None if each.arm == YARDSTICK else each.above), gained(each.in_time)),
        )
        for method, runs in over_time(result, paced).items()
        for each in runs
    ]
    head = ("", "steps", "time", "above LoRA r=1 with 500 steps", "above LoRA r=1 in the same time")
    return text(
        table(head, rows),
        "Means over the five tasks, 95 % intervals. Time: in that of LoRA r=1's 500 steps.",
    )


class Rival(NamedTuple):
    """A method beside DVoRA r=1,024, on the tasks that have both: points above LoRA r=1's 500 steps."""

    arm: str
    size: int
    step: str
    gain: Interval | None
    steps_in_time: tuple[int, int] | None
    gain_in_time: Interval | None
    above_high_in_time: Interval | None


def rivals(result: Result, paced: Rows) -> list[Rival]:
    """What DVoRA r=1,024 is compared with, by size: in as many steps, and in as much time.

    Args:
        paced: rows of `pace.json`.
    """
    tasks = result.tasks(HIGH, *(arm + IN_ITS_TIME for arm in AS_LONG))
    rows = []
    for arm in sorted((*AS_LONG, *BESIDE, HIGH), key=lambda arm: size_of(result, tasks[0], arm)):
        longer, steps, in_time = arm + IN_ITS_TIME, None, (None, None)
        if arm in AS_LONG:
            counts = [result.steps(task, longer) for task in tasks]
            steps = min(counts), max(counts)
            in_time = result.gain(tasks, longer, YARDSTICK), result.gain(tasks, longer, HIGH)
        gain = None if arm == YARDSTICK else result.gain(tasks, arm, YARDSTICK)
        rows.append(Rival(arm, size_of(result, tasks[0], arm), _step(paced, arm), gain, steps, *in_time))
    return rows


def _high_rank(result: Result, paced: Rows) -> str:
    lines = [
        (
            *(LABELS[each.arm], kilobytes(each.size), each.step, gained(each.gain)),
            "" if each.steps_in_time is None else span(each.steps_in_time),
            *(gained(each.gain_in_time), gained(each.above_high_in_time)),
        )
        for each in rivals(result, paced)
    ]
    head = ("", "kB, float16", "a step", "500 steps", "steps in r=1024's time", "in r=1024's time", "above r=1024 then")
    return text(
        table(head, lines),
        "Points above LoRA r=1's 500 steps; at last above r=1024: countries and Webster's fields, three seeds (five "
        "of 500 steps), 95 % intervals. A step: in LoRA r=1's, bfloat16, the mean of five tasks (`equal_bytes.json`, "
        "`pace.json`).",
    )


def _groups(result: Result, paced: Rows) -> str:
    tasks = result.tasks(*MAIN)
    arms = sorted(
        (arm for arm in BESIDE_GROUPS if result.tasks(arm) == tasks), key=lambda arm: size_of(result, tasks[0], arm)
    )
    lines = [
        (
            *(LABELS[arm], kilobytes(size_of(result, tasks[0], arm)), _step(paced, arm), _above(result, tasks, arm)),
            *("" if arm == grouped else gained(result.gain(tasks, grouped, arm)) for grouped in GROUPS),
            _in_time_of_groups(result, tasks, arm),
            *(f"{_score(result, task, arm):.1f}" for task in tasks),
        )
        for arm in arms
    ]
    head = ("", "kB, float16", "a step", "points above LoRA r=1", "r=16, 64 groups, above it", "r=64", "in its time")
    return text(
        table((*head, *(NAMES[task] for task in tasks)), lines),
        f"Test scores, {span(len(result.finals(task, arm)) for task in tasks for arm in GROUPS)} seeds of groups, "
        "differences on the seeds that both have, 95 % intervals. A step: in LoRA r=1's, bfloat16, the mean of five "
        "tasks, of both in turns (`equal_bytes.json`, `groups_pace.json`); those of the others are above. In its time: "
        "the others for as long as 500 steps of rank 64 with 64 groups take, three seeds.",
    )


def _in_time_of_groups(result: Result, tasks: Sequence[str], arm: str) -> str:
    """How far rank 64 with 64 groups is above an arm that was trained for as long."""
    as_long = arm + IN_TIME_OF_GROUPS
    return gained(result.gain(tasks, GROUPS[1], as_long)) if result.tasks(as_long) == tasks else ""


def details(content: Mapping[str, Any], paced: Rows) -> dict[str, str]:
    """The tables of these runs that stand in the benchmarks' README.

    Args:
        paced: rows of `pace.json`.
    """
    result = result_of(content)
    return {
        "what-each-part-does": _parts(result),
        "all-methods": _all(result, paced),
        "generation": _generation(result),
    }


def forms(content: Mapping[str, Any]) -> str:
    """Where training starts, and whether its head is fitted again: mean scores over the tasks of `heads.json`.

    Args:
        content: of the file.
    """
    finals = [row for row in content["rows"] if row["stage"] == "final"]

    def mean(head: str, is_again: bool, part: str, method: str = "") -> str:
        rows = [row for row in finals if row["arm"].startswith(method) and row["arm"].endswith(head)]
        return f"{100 * np.mean([(row['refitted'] if is_again else row)[part]['score'] for row in rows]):.1f}"

    methods = {"lora_r1": "LoRA r=1", "road": "RoAd", "r256": "DVoRA r=256", "lora_r8": "LoRA r=8"}
    lines = [
        (
            f"of {head} the rows" + (", fitted again" if is_again else ""),
            *(mean(head, is_again, part) for part in ("validation", "test")),
            *(mean(head, is_again, "test", method) for method in methods),
        )
        for head in ("all", "half")
        for is_again in (False, True)
    ]
    counts = {(row["task"], row["seed"]) for row in finals}
    return text(
        table(("head at the start", "validation", "test", *methods.values()), lines),
        f"Means over {len({task for task, _ in counts})} tasks, {len({seed for _, seed in counts})} seeds and these "
        "methods, batches of all rows (`heads.json`).",
    )


def _parts(result: Result) -> str:
    tasks = result.tasks(*PARTS)
    rows = (
        (
            *(label, kilobytes(size_of(result, tasks[0], arm)), _above(result, tasks, arm)),
            *(f"{_score(result, task, arm):.1f}" for task in tasks),
        )
        for arm, label in PARTS.items()
    )
    return text(table(("trained", "kB, float16", "points above LoRA r=1", *(NAMES[task] for task in tasks)), rows))


def _all(result: Result, paced: Rows) -> str:
    tasks = result.tasks(*FEW)
    others = [arm for arm in LABELS if arm == YARDSTICK or arm not in MAIN]
    arms = [arm for arm in others if result.finals(tasks[0], arm)]
    arms.sort(key=lambda arm: size_of(result, tasks[0], arm))

    def line(arm: str) -> tuple[str, ...]:
        scores = (result.score(task, arm) for task in tasks)
        return (
            *(LABELS[arm], kilobytes(size_of(result, tasks[0], arm)), _step(paced, arm), _above(result, tasks, arm)),
            *("" if score is None else f"{score.mean:.1f}" for score in scores),
        )

    head = ("", "kB, float16", "a step", "points above LoRA r=1", *(NAMES[task] for task in tasks))
    return text(
        table(head, map(line, arms)),
        "A step: in LoRA r=1's, bfloat16, the mean of the tasks that were timed (`pace.json`). No score: not run.",
    )


def _generation(result: Result) -> str:
    task = "cron_expressions"
    rows = (
        (
            *(LABELS[arm], kilobytes(size_of(result, task, arm))),
            *(f"{_score(result, task, arm):.1f}", _above(result, [task], arm)),
        )
        for arm in GENERATED
    )
    return text(table(("", "kB, float16", "right answers, %", "above LoRA r=1"), rows))


def _settings(result: Result) -> str:
    def cell(setting: Setting, arm: str) -> str:
        tasks = result.tasks(*(YARDSTICK + ending for ending in (TWICE if setting is USUAL else setting).endings))
        pairs = [(task, *(_best(result, task, setting, each) for each in (arm, YARDSTICK))) for task in tasks]
        gain = result.mean_gain([(task, ours, theirs) for task, ours, theirs in pairs if ours and theirs])
        return gained(gain if all(ours for _, ours, _ in pairs) else None)

    labels = heads(result.tasks(*FEW), read_grid()) | {arm: LABELS[arm] for arm in IN_SETTINGS}
    rows = ((label, *(cell(setting, arm) for setting in SETTINGS)) for arm, label in labels.items())
    return text(table(("", *(setting.label for setting in SETTINGS)), rows))


def _best(result: Result, task: str, setting: Setting, arm: str) -> str | None:
    endings = (setting.of_heads,) if arm in HEADS else setting.endings
    return result.lowest_loss(task, [arm + ending for ending in endings])


def _score(result: Result, task: str, arm: str) -> float:
    score = result.score(task, arm)
    assert score is not None, (task, arm)
    return score.mean


def _mean_score(result: Result, tasks: Sequence[str], arm: str) -> float:
    return float(np.mean([_score(result, task, arm) for task in tasks]))


def _above(result: Result, tasks: Sequence[str], arm: str) -> str:
    return gained(None if arm == YARDSTICK else result.gain(tasks, arm, YARDSTICK))


def _over_tasks(result: Result, tasks: Sequence[str], arm: str) -> str:
    gain = None if arm == YARDSTICK else result.gain_over_tasks(tasks, arm, YARDSTICK)
    return "" if gain is None else f"{gain.low:+.1f} to {gain.high:+.1f}"


def _in_time(runs: Sequence[Timed]) -> str:
    """The run that takes as long as `MATCHED`, above it."""
    return gained(next((each.in_time for each in runs if RIVALS.get(each.arm) == MATCHED), None))


def _steps(speeds: Rows, name: str, paced: Rows, arm: str) -> str:
    """The time of a step of MiniLM in LoRA r=1's, in float32 and in the grid."""
    setting = {"part": "training", "workload": "minilm", "dtype": "float32", "batch": 16}
    wide = time_ratio(speeds, name, "LoRA r=1", **setting) if name else None
    return f"{'-' if wide is None else f'{wide.median:.2f}'} / {_step(paced, arm)}"


def _step(paced: Rows, arm: str) -> str:
    """The time of a step of the grid in LoRA r=1's, the mean of the tasks; nothing where none was timed."""
    ratios = [row["ratio"][1] for row in paced if (row["arm"], row["dtype"]) == (arm, "bfloat16")]
    return "1.00" if arm == YARDSTICK else f"{np.mean(ratios):.2f}" if ratios else ""


def _seeds(result: Result, tasks: Sequence[str]) -> str:
    return span(len(result.finals(task, arm)) for task in tasks for arm in MAIN)
