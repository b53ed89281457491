"""Which runs follow from which results: the same number of trials for each method, and nothing chosen on test."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.quality.grid import FILE, Grid, Rates, Run, read_grid
from benchmarks.quality.results import EQUAL_BYTES, read_rows
from benchmarks.quality.schedule import alone, foreign, ready, remaining
from benchmarks.quality.tuning import chosen, trials

GRID = read_grid()
SECOND = read_grid(FILE.parent / "equal_bytes.yaml")
TUNED = [name for name, arm in GRID.arms.items() if arm.rates]
Loss = dict[str, Any]


def row(loss: float | None, test: float = 0.0) -> Loss:
    return {"validation": {"loss": loss, "score": 0.5}, "test": {"loss": test, "score": test}}


def best_near(adapter: float, magnitude: float = 3e-3) -> Any:
    """Losses with their minimum at these rates."""

    def loss(run: Run) -> float:
        assert run.rates is not None
        off = math.log(run.rates.adapter / adapter) ** 2
        return 10 * off + math.log((run.rates.magnitude or magnitude) / magnitude) ** 2

    return loss


def carried_out(task: str, name: str, loss: Any, grid: Grid = GRID) -> dict[str, Loss]:
    rows: dict[str, Loss] = {}
    while waiting := [run for run in trials(grid, task, name, rows) if run.key not in rows]:
        rows |= {run.key: {**row(loss(run)), "task": task, "arm": name, "stage": "trial", "seed": 0} for run in waiting}
    return rows


@pytest.mark.parametrize("best", [1e-9, 1.0, 1e9], ids=["lowest", "in the middle", "highest"])
@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize(("task", "count"), [("wordnet10", 7), ("fashion_mnist", 8), ("shakespeare", 7)])
def test_every_method_gets_as_many_trials(task: str, count: int, name: str, best: float) -> None:
    middle = sorted(GRID.arms[name].rates)[1]
    rows = carried_out(task, name, best_near(best if best != 1 else middle))
    assert len(rows) == count


@pytest.mark.parametrize("name", [name for name, arm in SECOND.arms.items() if arm.rates and arm.rate_by == "trials"])
@pytest.mark.parametrize(("best", "place"), [(1e-9, 0), (1e9, 4)], ids=["lowest", "highest"])
def test_the_second_grid_has_one_more_trial(name: str, best: float, place: int) -> None:
    """Three rates, and one beyond the best at an edge: as many for every arm."""
    low, _, high = sorted(SECOND.arms[name].rates)
    rows = carried_out("countries", name, best_near(best), SECOND)
    rates = [run.rates.adapter for run in trials(SECOND, "countries", name, rows) if run.rates]
    assert len(rates) == 4
    assert rates[3] == pytest.approx(low / 1.73**2 if place == 0 else high * 1.73**2)


@pytest.mark.parametrize(("best", "factor"), [(0.03, 1.73), (0.013, 1 / 1.73)])
def test_the_one_more_is_between_the_best_and_the_better_of_its_neighbours(best: float, factor: float) -> None:
    rows = carried_out("countries", "dvora_r256", best_near(best), SECOND)
    rates = [run.rates for run in trials(SECOND, "countries", "dvora_r256", rows)]
    assert rates[3] == Rates(pytest.approx(0.02 * factor), pytest.approx(9e-3 * factor), 1e-3)


def test_the_usual_rate_needs_no_trial() -> None:
    assert trials(SECOND, "countries", "lora_r8_default", {}) == []
    assert chosen(SECOND, "countries", "lora_r8_default", {}) == Rates(pytest.approx(0.001), None, 1e-3)
    assert [run.seed for run in ready(SECOND, {}, ["countries"], ["lora_r8_default"])] == [0, 1]


def test_the_rate_of_the_head_is_tried_where_it_matters() -> None:
    *before, last = trials(GRID, "fashion_mnist", "vera", carried_out("fashion_mnist", "vera", best_near(0.02)))
    assert {run.rates.head for run in before if run.rates} == {1e-3}
    assert last.rates == Rates(0.02, None, pytest.approx(1e-4))


def test_the_search_goes_beyond_an_edge_but_stays_near_what_is_best() -> None:
    low, high = (carried_out("wordnet10", "dvora", best_near(rate)) for rate in (1e-6, 10.0))
    assert {run.split()[-1].split("/")[0] for run in low} == {"0.007", "0.02", "0.07", "0.00234", "0.00405"}
    assert {run.split()[-1].split("/")[0] for run in high} == {"0.007", "0.02", "0.07", "0.121", "0.21"}


def test_the_lowest_validation_loss_wins() -> None:
    rows = carried_out("wordnet10", "dvora", best_near(0.02, magnitude=2.7e-2))
    assert chosen(GRID, "wordnet10", "dvora", rows) == Rates(0.02, pytest.approx(2.7e-2), 1e-3)


@pytest.mark.parametrize("name", ["dvora", "dora_r8", "d_initial_1"])
def test_the_magnitude_goes_with_the_adapter_before_it_is_tuned_alone(name: str) -> None:
    middle = sorted(GRID.arms[name].rates)[1]
    runs = trials(GRID, "wordnet10", name, carried_out("wordnet10", name, best_near(middle)))
    shares = [(run.rates.magnitude or 0) / run.rates.adapter for run in runs if run.rates]
    assert shares[:5] == pytest.approx([9e-3 / middle] * 5)
    assert shares[5:] == pytest.approx([9e-3 / middle * factor for factor in (0.33, 3)])


def test_the_test_split_does_not_choose() -> None:
    rows = carried_out("wordnet10", "vera", best_near(0.02))
    before = chosen(GRID, "wordnet10", "vera", rows)
    for key in rows:
        rows[key]["test"] = {"loss": -1.0 if "0.07" in key else 1.0, "score": 1.0}
    assert chosen(GRID, "wordnet10", "vera", rows) == before


def test_a_run_that_failed_or_diverged_is_not_chosen() -> None:
    def loss(run: Run) -> float | None:
        assert run.rates is not None
        return None if run.rates.adapter > 0.01 else 1.0

    rows = carried_out("wordnet10", "vera", loss)
    best = chosen(GRID, "wordnet10", "vera", rows)
    assert best is not None
    assert best.adapter <= 0.01


def test_nothing_is_chosen_while_trials_are_missing() -> None:
    rows = carried_out("wordnet10", "vera", best_near(0.02))
    rows.pop(next(iter(rows)))
    assert chosen(GRID, "wordnet10", "vera", rows) is None
    assert not [run for run in ready(GRID, rows, ["wordnet10"], ["vera"]) if run.stage == "final"]


def test_rates_are_taken_over_from_another_arm_and_another_task() -> None:
    rows = carried_out("movie_reviews", "dvora", best_near(0.02, magnitude=2.7e-2))
    own = chosen(GRID, "movie_reviews", "dvora", rows)
    assert own == chosen(GRID, "tweets", "dvora", rows) == chosen(GRID, "movie_reviews", "dvora_r16", rows)
    assert not [run for run in ready(GRID, rows, ["tweets"], ["dvora"]) if run.stage == "trial"]


def test_one_rate_is_one_rate() -> None:
    rows = carried_out("wordnet10", "dvora", best_near(0.02))
    assert chosen(GRID, "wordnet10", "one_rate", rows) == Rates(0.02, 0.02, 1e-3)


def test_methods_without_a_magnitude_have_no_rate_for_it_and_texts_have_no_head() -> None:
    assert all(run.rates and run.rates.magnitude is None for run in trials(GRID, "wordnet10", "lora_r8", {}))
    assert all(run.rates and run.rates.head is None for run in trials(GRID, "shakespeare", "dvora", {}))


def test_one_seed_of_every_arm_comes_before_the_next_seed() -> None:
    rows = {
        key: each for arm in ("dvora", "vera") for key, each in carried_out("wordnet10", arm, best_near(0.02)).items()
    }
    runs = ready(GRID, rows, ["wordnet10"], ["dvora", "vera"])
    assert [(run.seed, run.arm) for run in runs][:4] == [(0, "dvora"), (0, "vera"), (1, "dvora"), (1, "vera")]
    assert remaining(GRID, rows, ["wordnet10"], ["dvora", "vera"]) == len(runs) == 2 * len(GRID.training["final_seeds"])


def test_what_is_measured_alone_is_each_arm_once_in_each_model() -> None:
    rows = carried_out("movie_reviews", "dvora", best_near(0.02))
    runs = alone(GRID, rows, list(GRID.tasks), ["dvora", "frozen"])
    assert [(run.task, run.arm, run.stage) for run in runs] == [("movie_reviews", "dvora", "alone")]


def test_rows_of_another_grid_are_known() -> None:
    rows = carried_out("movie_reviews", "dvora", best_near(0.02))
    own = [*ready(GRID, rows, ["movie_reviews"], ["dvora"]), *alone(GRID, rows, ["movie_reviews"], ["dvora"])]
    assert own
    rows |= {run.key: row(0.5) for run in own}
    assert foreign(GRID, rows) == []
    assert foreign(GRID, {**rows, "movie_reviews dvora final seed 0 steps 7": row(0.5)}) == [
        "movie_reviews dvora final seed 0 steps 7"
    ]


def test_every_row_of_the_result_file_is_of_the_grid() -> None:
    assert foreign(GRID, read_rows()) == []
    assert foreign(SECOND, read_rows(EQUAL_BYTES)) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ["chess"]}, ValueError, "names the task 'chess'"),
        ({"tuned_as": "frozen"}, ValueError, "tuned as 'frozen', which is no arm with rates"),
        ({"tuned_as": "nothing"}, ValueError, "tuned as 'nothing'"),
        ({"rate_by": "centre", "centre": 0.01}, ValueError, "needs a centre and rates"),
        ({"one_rate": True, "rates": [0.1, 0.2, 0.3]}, ValueError, "give it tuned_as"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_a_wrong_grid_is_refused(change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    content["arms"]["odd"] = {"method": "dvora", "r": 8, **change}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(error, match=message):
        read_grid(file)
