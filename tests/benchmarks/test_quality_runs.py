"""Runs of every method on a little of the real data, and the command from end to end."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]

from benchmarks.quality import backbones, fine_tuned
from benchmarks.quality.__main__ import main
from benchmarks.quality.grid import FILE, Grid, Rates, Run, TaskPlan, read_grid
from benchmarks.quality.heads import best_linear
from benchmarks.quality.problems import problem
from benchmarks.quality.running import carry_out
from benchmarks.quality.training import FALLS

ROOT = Path(__file__).parent.parent.parent
PLAN = TaskPlan(model="minilm", steps=3, batch=4, train=40, validation=6, test=6)
TINY = ("dora_r1", "vblora", "unilora_4096", "randlora", "ia3", "structured_r64_query_value", "rslora_r16")
"""Of the second grid, those whose method or layers the first has not."""
ARMS = ("dvora", "vera", "lora_r8", "dora_r8", "full", "magnitude", "bitfit", "ia3", "dvora_structured", "dvora_nf4")


@pytest.fixture
def grid() -> Grid:
    whole = read_grid()
    return replace(whole, tasks=dict.fromkeys(("movie_reviews", "movie_ratings"), PLAN))


def row(grid: Grid, arm: str, rate: float, task: str = "movie_reviews", stage: Any = "final") -> dict[str, Any]:
    magnitude = rate if grid.arms[arm].magnitude else None
    found = carry_out(grid, Run(task, arm, stage, 0, 3, Rates(rate, magnitude, 1e-3)))
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_what_a_method_trains_depends_on_its_rate(grid: Grid, arm: str) -> None:
    """A cast that was kept from an earlier step once froze every weight, and the loss was that of the head alone."""
    slow, fast = (row(grid, arm, rate)["validation"]["loss"] for rate in (1e-9, 3e-2))
    assert abs(fast - slow) > 1e-4


@pytest.mark.parametrize("arm", TINY)
def test_so_does_every_method_of_the_second_grid(arm: str) -> None:
    grid = read_grid(FILE.parent / "equal_bytes.yaml")
    grid = replace(grid, tasks={"movie_ratings": PLAN})
    slow, fast = (row(grid, arm, rate, "movie_ratings") for rate in (1e-9, 3e-2))
    assert abs(fast["validation"]["loss"] - slow["validation"]["loss"]) > 1e-4
    assert 0 < fast["smallest_bytes"] < fast["saved_bytes"]
    assert (fast["seeded_bytes"] > 0) == (arm == "randlora")
    assert fast["test_in_half"]["loss"] == pytest.approx(fast["test"]["loss"], rel=0.05)


def test_a_base_that_was_fine_tuned_before_is_another_base(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backbones, fine_tuned):
        monkeypatch.setattr(module, "FINE_TUNED", "test-quality-fine-tuned-for-three-steps")
    monkeypatch.setattr(fine_tuned, "TASK", "movie_ratings")
    arms = {"plain": grid.arms["lora_r8"], "after": replace(grid.arms["lora_r8"], base="fine_tuned")}
    grid = replace(grid, arms={**grid.arms, **arms})
    plain, after = (row(grid, arm, 1e-9) for arm in arms)
    assert plain["validation"]["loss"] != after["validation"]["loss"]


def test_a_run_again_gives_the_same_row(grid: Grid) -> None:
    first, second = (row(grid, "dvora", 0.02) for _ in range(2))
    assert first["validation"]["loss"] == pytest.approx(second["validation"]["loss"], abs=1e-3)
    assert first["saved_bytes"] == second["saved_bytes"]


def test_sizes_are_counted_without_the_head(grid: Grid) -> None:
    expected = 6 * (5 * (2 * 384 + 256) + 2 * 1536 + 256)
    assert [row(grid, arm, 0.02)["trained_values"] for arm in ("dvora", "vera_equal")] == [expected, expected]


def test_a_trial_does_not_look_at_the_test_split(grid: Grid) -> None:
    assert not {"test", "items"} & set(row(grid, "dvora", 0.02, stage="trial"))


@pytest.mark.parametrize("arm", ["majority", "tfidf", "frozen"])
@pytest.mark.parametrize("task", ["movie_reviews", "movie_ratings"])
def test_baselines_take_no_steps(grid: Grid, arm: str, task: str) -> None:
    found = carry_out(grid, Run(task, arm, "final", 0, 0, None))
    assert "error" not in found, found
    assert ("reference" in found) == (arm == "majority" and task == "movie_ratings") or arm != "majority"


def test_padding_changes_no_loss_and_a_model_that_has_learned_nothing_scores_zero() -> None:
    plan = TaskPlan(model="smollm2", steps=1, batch=2, train=4, validation=2, test=2)
    task = problem("cron_expressions", plan)
    model = task.model("float32")
    with torch.no_grad():
        alone = [task.loss(model, np.array([each])) for each in range(4)]
        tokens = [len(answer) for answer in task.answers["train"]]  # type: ignore[attr-defined]
        mean = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
        assert task.loss(model, np.arange(4)).item() == pytest.approx(float(mean), rel=1e-4)
    assert task.evaluate(model, "test").score == 0


@pytest.mark.parametrize(("name", "middle", "last"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)])
def test_how_a_rate_falls(name: str, middle: float, last: float) -> None:
    fall = FALLS[name]
    assert [fall(done) for done in (0, 0.5, 1)] == [1, pytest.approx(middle), pytest.approx(last)]


def test_a_failure_is_a_row(grid: Grid) -> None:
    found = carry_out(grid, Run("movie_reviews", "dvora", "final", 0, 3, None))
    assert found["error"].startswith("AssertionError")


def test_a_run_that_diverges_says_so(grid: Grid) -> None:
    found = row(grid, "full", 1e30)
    assert found["diverged"]
    assert found["validation"] is None


def test_batches_depend_on_the_seed_alone_and_have_one_size() -> None:
    task = problem("movie_reviews", PLAN)
    first, again, other = (task.batches(seed, 30) for seed in (1, 1, 2))
    assert all(len(rows) == PLAN.batch for rows in first)
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_accepts_a_constant_feature_and_can_be_saved(classes: int) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((90, 4)).astype(np.float32)
    features[:, 1] = 0
    labels = np.digitize(features[:, 0], [0] if classes == 2 else [-0.5, 0.5])
    weight, bias = best_linear((features, labels), (features, labels), classes)
    predicted = torch.from_numpy(features @ weight.T + bias).argmax(1)
    assert (predicted.numpy() == labels).mean() > 0.9
    assert weight.flags.c_contiguous


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """The parent is killed while its process is in a run."""
    code = (
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from benchmarks.quality.processes import start_process\n"
        "pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=start_process, initargs=(0,))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.submit(time.sleep, 600)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert ended_within(child, seconds=30)


def ended_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.2)
    return False


def test_the_command_goes_on_where_it_was(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    content["tasks"] = {"movie_reviews": vars(PLAN)}
    content["arms"] = {name: content["arms"][name] for name in ("majority", "vera")}
    content["training"]["final_seeds"] = [0]
    grid, output = tmp_path / "grid.yaml", tmp_path / "quality.json"
    grid.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["--grid", str(grid), "--output", str(output), "--processes", "1"]

    main([*options, "--arm", "majority"])
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [each["arm"] for each in rows] == ["majority"]

    main(options)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [each["stage"] for each in rows] == ["final", *["trial"] * 7, "final"]
    assert not any("error" in each for each in rows)

    with pytest.raises(SystemExit, match="no row has the key 'nothing'"):
        main([*options, "--repeat", "nothing"])
