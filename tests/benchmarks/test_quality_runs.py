"""Runs of every method on a little of the real data, and the command from end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]

from benchmarks.quality import pace
from benchmarks.quality.__main__ import main
from benchmarks.quality.grid import FILE, Grid, Rates, Run, TaskPlan, read_grid
from benchmarks.quality.labelled import problem
from benchmarks.quality.running import carry_out

pytestmark = pytest.mark.usefixtures("products_in_bfloat16")
PLAN = TaskPlan(model="minilm", steps=3, batch=4, train=40, validation=6, test=6)
ARMS = ("dvora_r64_nf4", "full", "rows_columns_low_rank")
"""One of each kind: of PEFT's on a quantised base, all weights, of `benchmarks.parts`."""


@pytest.fixture
def grid() -> Grid:
    grid = read_grid()
    quantised = replace(grid.arms["dvora_r64"], base="nf4")
    return replace(grid, tasks={"movie_ratings": PLAN}, arms={**grid.arms, "dvora_r64_nf4": quantised})


def row(grid: Grid, arm: str, rate: float, stage: Any = "final") -> dict[str, Any]:
    magnitude = rate if grid.arms[arm].magnitude else None
    made = carry_out(grid, Run("movie_ratings", arm, stage, 0, 3, Rates(rate, magnitude, 1e-3)))
    assert "error" not in made, made["error"]
    return made


@pytest.mark.parametrize("arm", ARMS)
def test_what_a_method_trains_depends_on_its_rate(grid: Grid, arm: str) -> None:
    """A cast that was kept from an earlier step once froze every weight, and the loss was that of the head alone."""
    slow, fast = (row(grid, arm, rate) for rate in (1e-9, 3e-2))
    assert abs(fast["validation"]["loss"] - slow["validation"]["loss"]) > 1e-4
    assert 0 < fast["smallest_bytes"] < fast["saved_bytes"]
    assert fast["seeded_bytes"] == 0
    assert fast["test_in_half"]["loss"] == pytest.approx(fast["test"]["loss"], rel=0.05)
    assert "items" in fast


def test_steps_are_timed_in_turns(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "ARMS", ("dvora_r256", "road"))
    rows = pace.timed(grid, "movie_ratings", pace.ARMS, count=2)
    assert [made["arm"] for made in rows] == [*pace.ARMS]
    assert all(made["ratio"][0] <= made["ratio"][1] <= made["ratio"][2] for made in rows)
    assert "RoAd" in pace.pace({"rows": rows})


@pytest.mark.parametrize("arm", ["majority", "frozen"])
def test_baselines_take_no_steps(grid: Grid, arm: str) -> None:
    made = carry_out(grid, Run("movie_ratings", arm, "final", 0, 0, None))
    assert "error" not in made, made
    assert ("reference" in made) == (arm == "majority")


def test_a_head_of_all_rows_is_fitted_to_those_of_the_batches_too(grid: Grid) -> None:
    grid = replace(grid, tasks={"movie_ratings": replace(PLAN, fresh=60)})
    start, larger = (problem("movie_ratings", grid.plan("movie_ratings", arm)) for arm in ("frozen", "frozen_all_rows"))
    rows = [start.parts[part].labels for part in ("train", "batches")]  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(rows), larger.parts["train"].labels)  # type: ignore[attr-defined]
    made = [carry_out(grid, Run("movie_ratings", arm, "final", 0, 0, None)) for arm in ("frozen", "frozen_all_rows")]
    assert made[0]["test"]["loss"] != made[1]["test"]["loss"]


def test_padding_changes_no_loss_and_a_model_that_has_learned_nothing_scores_zero() -> None:
    task = problem("cron_expressions", TaskPlan(model="smollm2", steps=1, batch=2, train=4, validation=2, test=2))
    model = task.model("float32")
    with torch.no_grad():
        alone = [task.loss(model, np.array([each])) for each in range(4)]
        tokens = [len(answer) for answer in task.answers["train"]]  # type: ignore[attr-defined]
        mean = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
        assert task.loss(model, np.arange(4)).item() == pytest.approx(float(mean), rel=1e-4)
    assert task.evaluate(model, "test").score == 0


def test_the_command(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    content["tasks"] = {"movie_ratings": vars(PLAN)}
    content["arms"] = {name: content["arms"][name] for name in ("majority", "vera_r256")}
    content["training"]["final_seeds"] = [0]
    grid, output = tmp_path / "grid.yaml", tmp_path / "quality.json"
    grid.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["--grid", str(grid), "--output", str(output), "--processes", "1"]
    main(options)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert sorted(each["stage"] for each in rows) == ["final"] * 2 + ["trial"] * 4
    assert not any("error" in each for each in rows)
    # Matrices that a seed makes are no bytes of the smallest file.
    seeded = {each["arm"]: each.get("seeded_bytes", 0) > 0 for each in rows if each["stage"] == "final"}
    assert seeded == {"majority": False, "vera_r256": True}
    with pytest.raises(SystemExit, match="has the key 'nothing'"):
        main([*options, "--repeat", "nothing"])
