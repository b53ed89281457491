"""Which runs follow from which results: as many trials for each method, and nothing chosen on test."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.quality.grid import FILE, Rates, Run, read_grid
from benchmarks.results import file_of, read_rows

GRID = read_grid()
TUNED = [name for name, arm in GRID.arms.items() if arm.rates]
Rows = dict[str, dict[str, Any]]


def row(loss: float | None, test: float = 0.0) -> dict[str, Any]:
    return {"validation": {"loss": loss, "score": 0.5}, "test": {"loss": test, "score": test}}


def best_near(rate: float) -> Callable[[Run], float]:
    """Losses with their minimum at an adapter's rate."""
    return lambda run: math.log((run.rates.adapter if run.rates else 1) / rate) ** 2


def carried_out(name: str, loss: Callable[[Run], float | None]) -> Rows:
    rows: Rows = {}
    while waiting := [run for run in GRID.trials("countries", name, rows) if run.key not in rows]:
        rows |= {run.key: row(loss(run)) for run in waiting}
    return rows


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize(("best", "place"), [(1e-9, 0), (1e9, 4)], ids=["lowest", "highest"])
def test_every_method_gets_three_rates_and_one_beyond_the_best_edge(name: str, best: float, place: int) -> None:
    low, _, high = sorted(GRID.arms[name].rates)
    rows = carried_out(name, best_near(best))
    rates = [run.rates.adapter for run in GRID.trials("countries", name, rows) if run.rates]
    assert len(rates) == 4
    assert rates[3] == pytest.approx(low / 1.73**2 if place == 0 else high * 1.73**2)


@pytest.mark.parametrize(("best", "factor"), [(0.03, 1.73), (0.013, 1 / 1.73)])
def test_the_fourth_is_between_the_best_and_the_better_of_its_neighbours(best: float, factor: float) -> None:
    rows = carried_out("dvora_r256", best_near(best))
    rates = [run.rates for run in GRID.trials("countries", "dvora_r256", rows)]
    assert rates[3] == Rates(pytest.approx(0.02 * factor), pytest.approx(9e-3 * factor), 1e-3)


def test_a_fixed_rate_needs_no_trial() -> None:
    assert GRID.chosen("countries", "lora_r8_default", {}) == Rates(0.001, None, 1e-3)
    assert [run.seed for run in GRID.waiting({}, ["countries"], ["lora_r8_default"])] == [0, 1]


def test_the_lowest_validation_loss_wins_and_the_test_split_does_not_choose() -> None:
    rows = carried_out("vera_r256", best_near(0.015))
    before = GRID.chosen("countries", "vera_r256", rows)
    assert before is not None
    assert before.adapter == pytest.approx(0.015)
    for key in rows:
        rows[key]["test"] = {"loss": -1.0 if "0.135" in key else 1.0, "score": 1.0}
    assert GRID.chosen("countries", "vera_r256", rows) == before


def test_a_run_that_failed_or_diverged_is_not_chosen() -> None:
    def loss(run: Run) -> float | None:
        assert run.rates is not None
        return None if run.rates.adapter > 0.03 else 1.0

    best = GRID.chosen("countries", "vera_r256", carried_out("vera_r256", loss))
    assert best is not None
    assert best.adapter <= 0.03


def test_nothing_is_chosen_while_trials_are_missing() -> None:
    rows = carried_out("vera_r256", best_near(0.045))
    rows.pop(next(iter(rows)))
    assert GRID.chosen("countries", "vera_r256", rows) is None
    assert not [run for run in GRID.waiting(rows, ["countries"], ["vera_r256"]) if run.stage == "final"]


def test_rates_are_taken_over_from_another_arm() -> None:
    rows = carried_out("structured_r64", best_near(0.02))
    rates = GRID.chosen("countries", "structured_r64", rows)
    assert rates == Rates(pytest.approx(0.02), pytest.approx(9e-3), 1e-3)
    assert GRID.chosen("countries", "structured_r64_twice_half", rows) == Rates(
        pytest.approx(0.01), pytest.approx(4.5e-3), 1e-3
    )


def test_the_committed_rows_are_those_of_the_grid() -> None:
    """What was tuned, chosen and trained is what this grid would tune, choose and train again."""
    rows = read_rows(file_of("equal_bytes"))
    keys = {run.key for run in GRID.waiting(rows, list(GRID.tasks), list(GRID.arms))}
    assert {key for key, each in rows.items() if each["stage"] != "alone"} <= keys
    assert {key.split()[0] for key in keys - rows.keys()} == {"cron_expressions"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["cities"]}, "names the task 'cities'"),
        ({"rates": [], "tuned_as": "frozen"}, "tuned as 'frozen', which is no arm with rates"),
        ({"rates": []}, "has no learning rate"),
    ],
)
def test_a_grid_that_cannot_run_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    content["arms"]["lora_r1"] |= change
    content["arms"] = {name: content["arms"][name] for name in ("frozen", "lora_r1")}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_grid(file)
