"""How much of an adapter's gain is left in the last blocks: a table and a picture, from `depth.json` and the grid."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.pictures import FAINT, METHODS, WIDTH
from benchmarks.quality.summary import NAMES
from benchmarks.results import load
from benchmarks.speed.metrics import Rows
from benchmarks.tables import table, text

TASKS = ("countries", "webster_fields", "code_languages", "wordnet_topics", "movie_ratings")
BLOCKS, CLASSIFIERS = 6, 6
ARMS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "r256": ("DVoRA r=256", "DVoRA", ("r256_last_1", "r256_last_2", "r256_last_3", "structured_r256")),
    "lora_r8": ("LoRA r=8", "LoRA", ("lora_r8_last_1", "lora_r8_last_2", "lora_r8_last_3", "lora_r8")),
}
"""Names, colours, and the arms in the last block, two, three and all."""
DEPTHS = (1, 2, 3, BLOCKS)
HIGH = ("r1024_last_1", "r1024_last_2", "r1024_last_3", "structured_r1024")
"""DVoRA r=1,024 in the last block, two, three and all, on the two tasks that have rows of all."""
HEAD = "frozen_all_rows"
KEPT = 0.8
"""Of the gain in all blocks: as much makes a depth the advice (LOG.md)."""
Scores = Mapping[tuple[str, str], Mapping[int, float]]


def scores_of(rows: Rows) -> Scores:
    """Test scores in points by arm and task, and by seed."""
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["stage"] == "final" and row.get("test"):
            scores.setdefault((row["arm"], row["task"]), {})[row["seed"]] = 100 * row["test"]["score"]
    return scores


def seeds_of(scores: Scores) -> list[int]:
    """The seeds with which all arms have run on all tasks."""
    every = [{*scores.get((arm, task), {})} for _, _, arms in ARMS.values() for arm in arms for task in TASKS]
    return sorted(set.intersection(*every))


def means(scores: Scores, arm: str, tasks: Sequence[str] = TASKS) -> list[float]:
    """The score of an arm on each task, over the seeds of all; heads alone have no random part."""
    seeds = [0] if arm == HEAD else seeds_of(scores)
    return [sum(scores[arm, task][seed] for seed in seeds) / len(seeds) for task in tasks]


def gain(scores: Scores, arm: str, tasks: Sequence[str] = TASKS) -> float:
    """Mean points above the head alone."""
    return (sum(means(scores, arm, tasks)) - sum(means(scores, HEAD, tasks))) / len(tasks)


def parts(content: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the page.

    Args:
        content: of `depth.json`.
        grid: of `equal_bytes.json`, with the runs in all blocks and the heads alone.
    """
    scores = scores_of([*content["rows"], *grid["rows"]])
    names, lines = {1: "the last block", BLOCKS: f"all {BLOCKS}"}, []
    for label, _, arms in ARMS.values():
        for depth, arm in zip(DEPTHS, arms, strict=True):
            share = gain(scores, arm) / gain(scores, arms[-1])
            shown = [f"{score:.1f}" for score in means(scores, arm)]
            where = names.get(depth, f"the last {depth}")
            lines.append(
                (f"{label}, {where}", *shown, f"{gain(scores, arm):+.1f}", f"{share:.0%}", str(_layers(depth)))
            )
    seeds = ", ".join(map(str, seeds_of(scores)))
    of_head = [f"{score:.1f}" for score in means(scores, HEAD)]
    three = ARMS["r256"][2]
    share = gain(scores, three[2]) / gain(scores, three[3])
    both = [f"{gain(scores, arm, TASKS[:2]):+.1f}" for arm in HIGH]
    verdict = "are enough" if share >= KEPT else "are not enough"
    return {
        "depth-in-short": f"**Three of six blocks {verdict}**: they keep {share:.0%} of what DVoRA r=256 gains in all "
        f"six over the head alone, {gain(scores, three[2]):+.1f} of {gain(scores, three[3]):+.1f} points (LoRA r=8: "
        f"{gain(scores, ARMS['lora_r8'][2][2]):+.1f} of {gain(scores, ARMS['lora_r8'][2][3]):+.1f}).\n",
        "depth": text(
            table(
                ("", *(NAMES[task] for task in TASKS), "above the head alone", "of all blocks'", "blocks for 6"),
                [("head alone, of all rows", *of_head, "", "", str(_layers(0))), *lines],
            ),
            f"DVoRA r=1,024 in the last block, two, three and all: {', '.join(both)} above it on the first two tasks.",
            f"MiniLM, test scores, seeds {seeds}, 500 steps; blocks for 6: computed for six classifiers on one text "
            f"(`benchmarks/results/depth.json` and `equal_bytes.json`; torch {content['environment']['torch']}, PEFT "
            f"{content['environment']['peft']}, CPU).",
        ),
    }


def picture() -> Figure:
    """Points above the head alone against the blocks that six classifiers on one text take."""
    scores = scores_of([*load("depth")["rows"], *load("equal_bytes")["rows"]])
    figure, axes = plt.subplots(figsize=(WIDTH, 3.3), layout="constrained")
    axes.axhline(0, color=FAINT, linewidth=1)
    for label, colour, arms in ARMS.values():
        gains = [gain(scores, arm) for arm in arms]
        axes.plot([_layers(depth) for depth in DEPTHS], gains, "o-", color=METHODS[colour])
        look: dict[str, Any] = {"color": METHODS[colour], "weight": "bold", "ha": "right"}
        side = 8 if label.startswith("LoRA") else -38
        axes.annotate(label, (_layers(BLOCKS), gains[-1]), (0, side), textcoords="offset points", **look)
    axes.set_xticks([_layers(depth) for depth in (0, *DEPTHS)])
    axes.set(
        xlim=(4, 38), xlabel="blocks computed for six classifiers on one text: adapters in none, 1, 2, 3, all of six"
    )
    axes.set_ylabel("test points above the head alone")
    axes.set_title("MiniLM, mean over five tasks", fontsize="medium", loc="left")
    return figure


def _layers(depth: int) -> int:
    """Blocks computed for all classifiers on one text, with adapters in so many of the last ones."""
    return BLOCKS - depth + CLASSIFIERS * depth
