"""The second grid's summary: gains over LoRA r=1, the rules that decide, and the picture, on rows of known outcome."""

from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from benchmarks.quality import equal_bytes
from benchmarks.quality.equal_bytes import ARMS, GENERATION, MAIN, TWO, YARDSTICK
from benchmarks.quality.equal_bytes_page import GLANCE, at_a_glance, parts
from benchmarks.quality.equal_bytes_plots import equal_bytes as picture
from benchmarks.quality.equal_bytes_settings import COMPARED, SETTINGS, TWICE, USUAL, changed_places, gain_in, lines
from benchmarks.quality.grid import FILE, read_grid
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import Result
from tests.benchmarks.quality_rows import ITEMS, final, right, trial

GRID = read_grid(FILE.parent / "equal_bytes.yaml")
TASKS = list(GRID.tasks)


def rows_of(task: str, arm: str, counts: list[int], size: int = 1000, **more: Any) -> list[dict[str, Any]]:
    """A final run a seed, with so many items right."""
    sizes = {"saved_bytes": 2 * size, "seeded_bytes": 0, "smallest_bytes": size}
    return [final(task, arm, seed, right(count), **sizes, **more) for seed, count in enumerate(counts)]


def result(counts: dict[str, list[int]], tasks: list[str] | None = None) -> Result:
    rows = []
    for task in tasks or ["countries"]:
        rows.append(final(task, "majority", 0, right(5), steps=0))
        rows.append(final(task, "frozen", 0, right(5), steps=0, validation={"loss": 1.0, "score": 0.1}))
        for place, (arm, each) in enumerate(counts.items()):
            rows += rows_of(task, arm, each, size=1000 * (place + 1))
    return Result(tuple(rows))


def test_a_gain_is_the_mean_over_tasks_in_points() -> None:
    found = equal_bytes.gain(
        result({YARDSTICK: [30, 30], "dvora_r256": [35, 36]}, ["countries", "webster_fields"]),
        ["countries", "webster_fields"],
        "dvora_r256",
    )
    assert found is not None
    assert found.mean == pytest.approx(100 * 5.5 / ITEMS)


def test_a_task_counts_when_it_has_all_arms() -> None:
    rows = (*result({YARDSTICK: [1], "dvora_r256": [1]}).rows, *rows_of("webster_fields", YARDSTICK, [1]))
    assert equal_bytes.tasks_of(Result(rows), [YARDSTICK, "dvora_r256"]) == ["countries"]


@pytest.mark.parametrize(("low", "holds"), [(-0.29, True), (-0.31, False)])
def test_the_rule_of_the_defaults(low: float, holds: bool) -> None:
    assert equal_bytes.is_not_worse(Interval(0.1, low, 0.5)) == holds


def test_the_same_scores_decide_for_the_cheaper_kind_and_the_smaller_rank() -> None:
    lines = equal_bytes.decisions(
        result({"structured_r256": [30], "dvora_r256": [30], "structured_r64": [20]}), ["countries"]
    )
    assert "structured is the default" in lines[0]
    assert "64 is not shown to be as good" in lines[1]
    assert len(lines) == 2


def test_tuning_is_compared_with_the_default_rate() -> None:
    lines = equal_bytes.worth_of_tuning(result({"lora_r8": [45], "lora_r8_default": [30]}))
    assert lines == ["- LoRA r=8, four trials minus the default rate: +30.00: +18.00 to +42.00"]


@pytest.mark.parametrize(("cosine", "verdict"), [(40, "cosine becomes"), (30, "linear stays")])
def test_a_schedule_becomes_the_default_if_it_is_better(cosine: int, verdict: str) -> None:
    found = equal_bytes.schedules(result({equal_bytes.LINEAR: [30], "structured_r64": [cosine]}))
    assert len(found) == 1
    assert verdict in found[0]
    assert {equal_bytes.LINEAR, *equal_bytes.SCHEDULES.values()} <= set(GRID.arms)


def test_the_smallest_difference_that_is_seen() -> None:
    assert equal_bytes.smallest_seen(Interval(0, -1.96, 1.96)) == pytest.approx(2.8)


def test_what_a_rate_loses_is_a_share_of_what_tuning_gained() -> None:
    """From a start of 1.0 to the best loss: the best rate loses nothing, another half of the gain on one task."""
    losses = {"countries": {0.01: 0.5, 0.03: 0.6}, "webster_fields": {0.01: 0.7, 0.03: 0.4, 0.09: 0.5}}
    rows = list(result({}, list(losses)).rows)
    rows += [trial(task, "dvora_r256", *each) for task, some in losses.items() for each in some.items()]
    found = equal_bytes.rate_excess(Result(tuple(rows)), list(losses), "dvora_r256")
    assert found == {0.01: pytest.approx(0.25), 0.03: pytest.approx(0.1)}


def test_rounding_to_half_costs_what_it_says() -> None:
    rows = [{**row, "test_in_half": {"loss": 0.0, "score": 0.5}} for row in rows_of("countries", "lora_r1", [30])]
    assert equal_bytes.half_costs(Result(tuple(rows)), ["countries"], "lora_r1") == pytest.approx(10)
    assert equal_bytes.half_costs(Result(tuple(rows)), ["countries"], "lora_r8") is None


def test_a_best_trial_at_an_edge_is_told() -> None:
    rows = [trial("countries", "lora_r1", rate, loss) for rate, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (4, 0.2))]
    rows += [trial("countries", "lora_r8", rate, loss) for rate, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (4, 0.6))]
    assert equal_bytes.tuned_at_an_edge(Result(tuple(rows))) == ["LoRA r=1 on countries"]


def test_the_table_has_a_row_for_each_arm_smallest_first() -> None:
    found = equal_bytes.table(result({YARDSTICK: [30, 31], "dvora_r256": [30, 32], "lora_r8": [33, 35]}), ["countries"])
    assert [line.split(" | ")[0][2:] for line in found[2:]] == ["LoRA r=1", "DVoRA r=256, dense", "LoRA r=8"]
    assert all(line.count("|") == found[0].count("|") for line in found)
    assert "+7.0" in found[-1]


def test_the_picture_has_both_panels() -> None:
    """Every adapter at its kilobytes, inside of both panels, which have the same axes."""
    generator = np.random.default_rng(0)
    counts = {arm: generator.integers(20, 40, 2).tolist() for arm in ARMS}
    third = result({arm: counts[arm] for arm in MAIN}, TASKS[2:3])
    figure = picture(Result((*result(counts, TASKS[:2]).rows, *third.rows)))
    figure.canvas.draw()
    main, two = figure.axes
    assert [main.get_title(), two.get_title()] == ["mean over 3 tasks", "mean over 2 tasks"]
    at = sorted(x for line in two.containers for x in line.lines[0].get_xdata())
    assert at == pytest.approx([1 + place for place, arm in enumerate(ARMS) if arm != "full"])
    assert "full fine-tuning" in two.get_legend_handles_labels()[1], "a line, since it is far larger than the others"
    assert main.get_ylim() == two.get_ylim()
    low, high = main.get_xlim()
    assert low < at[0]
    assert at[-1] < high
    plt.close(figure)


@pytest.mark.parametrize(
    ("largest", "ticks"), [(200_000, ["20", "50", "100", "200"]), (40_000_000, ["100", "1,000", "10,000"])]
)
def test_a_long_axis_has_few_ticks(largest: int, ticks: list[str]) -> None:
    rows = result({arm: [30, 31] for arm in MAIN}).rows
    size = 20_000
    found = [{**row, "smallest_bytes": largest if row["arm"] == YARDSTICK else size} for row in rows]
    figure = picture(Result(tuple(found)))
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ticks
    plt.close(figure)


def test_generation_is_shown_for_itself() -> None:
    counts = {arm: [30, 31] for arm in MAIN}
    found = result(counts, ["countries", "cron_expressions"])
    assert equal_bytes.tasks_of(found, MAIN) == ["countries"]
    assert equal_bytes.tasks_of(found, GENERATION, generated=True) == ["cron_expressions"]
    figure = picture(found)
    assert [axes.get_title() for axes in figure.axes] == ["countries", "cron expressions"]
    assert not figure.axes[0].get_shared_y_axes().joined(*figure.axes), "another model's points are other points"
    plt.close(figure)
    text = parts(found, {"torch": "2", "peft": "0", "cores": 2}, missing=0)["equal-bytes-generation"]
    assert "| cron expressions |" in text


def test_the_parts_of_the_page_say_what_is_known_and_what_is_missing() -> None:
    environment = {"torch": "2", "peft": "0", "cores": 2}
    nothing = parts(result({}), environment, missing=7)
    assert "7 runs of the grid are missing" in nothing["equal-bytes-budget"]
    assert all(text.strip() for text in nothing.values())
    generator = np.random.default_rng(0)
    counts = {arm: generator.integers(20, 40, 2).tolist() for arm in ARMS}
    everything = parts(result(counts, TASKS[:2]), environment, missing=0)
    assert "missing" not in everything["equal-bytes-budget"]
    assert everything["equal-bytes-main"].count("\n| ") == everything["equal-bytes-two"].count("\n| ") == len(ARMS)
    assert "structured minus dense" in everything["equal-bytes-decisions"]


def in_settings(usual: int, twice: int, half: int, of: str = "dvora_r256") -> Result:
    """An arm with so many items right at 500 steps, at 1,000, and there with half of the rate; others have 30."""
    counts = {arm + ending: 30 for arm in COMPARED for ending in ("", "_twice", "_twice_half")}
    counts |= {of: usual, f"{of}_twice": twice, f"{of}_twice_half": half}
    rows = [final("countries", "majority", 0, right(5), steps=0), final("countries", "frozen", 0, right(5), steps=0)]
    for arm, count in counts.items():
        rows += rows_of("countries", arm, [count] * 3, validation={"loss": 1 - count / ITEMS, "score": 0.0})
    return Result(tuple(rows))


def test_of_two_rates_with_twice_the_steps_the_one_that_validates_better_counts() -> None:
    found = gain_in(in_settings(30, 33, 35), TWICE, "dvora_r256")
    assert found is not None
    assert found.mean == pytest.approx(100 * 5 / ITEMS)


@pytest.mark.parametrize(("usual", "twice", "changed"), [(45, 15, True), (45, 45, False), (45, 30, False)])
def test_methods_change_places_if_both_intervals_say_so(usual: int, twice: int, changed: bool) -> None:
    found = in_settings(usual, twice, twice)
    pairs = changed_places(found)
    assert ("LoRA r=1 and DVoRA r=256, dense" in pairs) == changed
    assert len(pairs) == (4 if changed else 0)
    assert ("change places: " in lines(found)[-3]) == changed


def test_with_half_of_the_yardsticks_steps() -> None:
    found = in_settings(25, 33, 35, of=YARDSTICK)
    assert lines(found)[-1].startswith("With half of the steps")
    gained = gain_in(found, USUAL, "dvora_r256", over_in=TWICE)
    assert gained is not None
    assert gained.mean == pytest.approx(100 * (30 - 35) / ITEMS)


def test_a_setting_without_all_its_runs_has_an_empty_cell() -> None:
    found = in_settings(30, 30, 30)
    few = Result(tuple(row for row in found.rows if row["arm"] != "vera_r256_twice_half"))
    assert gain_in(few, TWICE, "vera_r256") is None
    assert gain_in(few, USUAL, "vera_r256") is not None
    assert "frozen base" in "".join(lines(few))


def test_the_readme_compares_the_main_methods() -> None:
    found = result({arm: [30 + place] * 2 for place, arm in enumerate(MAIN)}, TASKS[:2])
    setting = {"part": "training", "workload": "minilm", "dtype": "float32"}
    times = {"LoRA r=1": 1.0, "LoRA r=8": 1.5}
    timed = [{**setting, "batch": b, "arm": arm, "seconds": [s]} for b in (16, 64) for arm, s in times.items()]
    text = at_a_glance({"rows": found.rows, "environment": {"torch": "2", "peft": "0"}}, timed)
    named = {cells[0]: cells[1:] for line in text.split("\n") if len(cells := line.strip("| ").split(" | ")) > 3}
    assert len(named) == 1 + len(GLANCE)
    assert named["LoRA r=1"] == ["1,234", "8 kB", "66.0", "", "1.00 / 1.00"]
    assert named["LoRA r=8"][2:] == ["68.0", "+2.0 (+0.0 to +6.0)", "1.50 / 1.50"]
    assert "mean over 2 tasks" in text
    assert "2 seeds" in text


def test_every_arm_is_in_the_grid_and_every_trained_arm_is_shown() -> None:
    assert set(ARMS) <= set(GRID.arms)
    trained = {name for name, arm in GRID.arms.items() if arm.rates and arm.rate_by == "trials"}
    assert trained == set(ARMS)
    everywhere = {arm + ending for setting in SETTINGS[:3] for arm in COMPARED for ending in setting.endings}
    assert everywhere - {"dvora_r256_nf4"} <= set(GRID.arms)
    assert {*MAIN, *TWO} <= set(ARMS)
    assert len({shown.label for shown in ARMS.values()}) == len(ARMS)
