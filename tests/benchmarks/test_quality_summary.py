"""Summaries of the rows: scores, differences, plateaus, tables and pictures, on made-up rows of known outcome."""

from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from benchmarks.quality import page
from benchmarks.quality.grid import read_grid
from benchmarks.quality.items import packed
from benchmarks.quality.plots import PICTURES
from benchmarks.quality.summary import ARMS, CHOICES, EQUAL_VALUES, KINDS, QUANTISED, RANKS, REQUIRED_ARM, SEEDS, Result
from benchmarks.quality.tables import score_cell, scores, sizes
from tests.benchmarks.quality_rows import ITEMS, final, right, trial

ENVIRONMENT = {"python": "3", "torch": "2", "peft": "0", "transformers": "5", "cores": 2, "threads": 1}
EVERY_ARM = list(read_grid().arms)


def classes(*rows: dict[str, Any]) -> Result:
    return Result((final("tweets", "majority", 0, right(25), steps=0), *rows))


def test_a_score_is_the_mean_over_seeds_in_percent() -> None:
    result = classes(*(final("tweets", "vera", seed, right(30 + seed)) for seed in range(3)))
    found = result.score("tweets", "vera")
    assert found is not None
    assert found.mean == pytest.approx(62)
    assert result.spread("tweets", "vera") == pytest.approx(2)
    assert result.score("tweets", "dvora") is None


def test_a_gain_counts_common_seeds_only() -> None:
    rows = [final("tweets", "vera", seed, right(30)) for seed in range(2)]
    rows += [final("tweets", "dvora", 1, right(35)), final("tweets", "dvora", 7, right(50))]
    found = classes(*rows).gain("tweets", "dvora", "vera")
    assert found is not None
    assert found.mean == pytest.approx(10)


def test_a_cell_says_when_it_has_fewer_seeds() -> None:
    rows = [final("tweets", "vera", seed, right(30)) for seed in range(3)]
    rows += [final("tweets", "dvora", seed, right(35)) for seed in range(2)]
    rows += [final("tweets", "lora_r8", 0, right(35)), final("tweets", "frozen", 0, right(25), steps=0)]
    cells = {arm: score_cell(classes(*rows), "tweets", arm, "vera") for arm in ("dvora", "lora_r8", "frozen")}
    assert "; 2 seeds)" in cells["dvora"]
    assert "; 1 seed)" in cells["lora_r8"]
    assert "seed" not in cells["frozen"]


def test_a_mean_gain_is_over_all_tasks_or_none() -> None:
    rows = [final("tweets", arm, 0, right(count)) for arm, count in (("vera", 30), ("dvora", 35))]
    rows += [final("wordnet10", "majority", 0, right(25), steps=0)]
    rows += [final("wordnet10", arm, 0, right(count)) for arm, count in (("vera", 30), ("dvora", 34))]
    result, pairs = classes(*rows), [(task, "dvora", "vera") for task in ("tweets", "wordnet10")]
    found = result.mean_gain(pairs)
    assert found is not None
    assert found.mean == pytest.approx(9)
    assert result.mean_gain([*pairs, ("movie_reviews", "dvora", "vera")]) is None
    assert result.mean_gain([]) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_baseline_is_compared_with_every_seed(turned: bool) -> None:
    rows = [final("tweets", "vera", seed, right(30 + seed)) for seed in range(3)]
    rows.append(final("tweets", "frozen", 0, right(25), steps=0))
    both = ("frozen", "vera") if turned else ("vera", "frozen")
    found = classes(*rows).gain("tweets", *both)
    assert found is not None
    assert found.mean == pytest.approx(-12 if turned else 12)


def test_fewer_bits_are_a_gain_and_a_lower_score() -> None:
    bytes_of_windows = np.full(4, 500.0, np.float32)
    rows = [
        final("shakespeare", "majority", 0, np.ones(4, np.float32), steps=0, reference=packed(bytes_of_windows)),
        *(final("shakespeare", arm, 0, np.full(4, nats, np.float32)) for arm, nats in (("vera", 700), ("dvora", 600))),
    ]
    result = Result(tuple(rows))
    score, gain = result.score("shakespeare", "dvora"), result.gain("shakespeare", "dvora", "vera")
    assert score is not None
    assert gain is not None
    assert score.mean == pytest.approx(600 / 500 / np.log(2))
    assert gain.mean == pytest.approx(100 / 500 / np.log(2))


def test_the_plateau_ends_where_a_quarter_of_the_gain_is_lost() -> None:
    """From a start of 1.0 to a best of 0.6, the limit is 0.7: a fifth of the way to 1.1 on both sides of the best."""
    losses = {0.001: 1.1, 0.01: 0.6, 0.1: 1.1}
    rows = [trial("tweets", "vera", rate, loss) for rate, loss in losses.items()]
    rows.append(trial("tweets", "vera", 0.01, 0.1, magnitude=5.0))
    start = final("tweets", "frozen", 0, right(25), steps=0, validation={"loss": 1.0, "score": 0.5})
    found = classes(start, *rows).plateau("tweets", "vera")
    assert found == (pytest.approx(10**0.4), True)


def test_a_plateau_that_was_not_left_is_open_and_a_diverged_trial_is_an_end() -> None:
    start = final("tweets", "frozen", 0, right(25), steps=0, validation={"loss": 1.0, "score": 0.5})
    rows = [
        trial("tweets", "vera", 0.001, 0.65),
        trial("tweets", "vera", 0.01, 0.6),
        trial("tweets", "vera", 0.1, None),
    ]
    found = classes(start, *rows).plateau("tweets", "vera")
    assert found is not None
    factor, ends = found
    assert factor == pytest.approx(10, rel=0.01)
    assert not ends


def test_of_two_rates_the_validation_loss_decides_and_not_the_test() -> None:
    low, high = {"loss": 0.5, "score": 0.5}, {"loss": 0.6, "score": 0.5}
    rows = [
        final("tweets", "vera_long", 0, right(10), validation=low),
        final("tweets", "vera_long_third", 0, right(50), validation=high),
    ]
    result = classes(*rows)
    assert result.lowest_loss("tweets", ("vera_long", "vera_long_third")) == "vera_long"
    assert result.lowest_loss("tweets", ("dvora_long", "dvora_long_third")) is None


def test_failures_and_bad_trials_are_listed() -> None:
    start = final("tweets", "frozen", 0, right(25), steps=0, validation={"loss": 1.0, "score": 0.5})
    failed = {**trial("tweets", "vera", 1, 0.5), "error": "ValueError: no"}
    lines = page.failures(classes(start, failed, trial("tweets", "vera", 2, 1.5), trial("tweets", "vera", 3, 0.5)))
    assert lines[0].endswith("ValueError: no")
    assert lines[-1].startswith("- 1 trials")


def everything() -> Result:
    """Rows of every arm on every task, as random as they come."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for task, kind in KINDS.items():
        reference = generator.random(ITEMS).astype(np.float32) + 300
        for arm in EVERY_ARM:
            steps = 0 if arm in ("majority", "tfidf", "frozen", "frozen_nf4") else 10
            for seed in (0, 1) if steps else (0,):
                values = generator.random(ITEMS).astype(np.float32)
                items = values > 0.5 if kind == "accuracy" else values
                rows.append(final(task, arm, seed, items, steps, reference=packed(reference)))
            rows += [trial(task, arm, rate, 0.5 + generator.random()) for rate in (0.01, 0.1, 1.0) if steps]
            alone = {"seconds_per_step": 0.1, "loaded_bytes": 10**8, "peak_bytes": 2 * 10**8}
            rows += [{**rows[-1], "stage": "alone", **alone}] if steps else []
    return Result(tuple(rows))


def test_every_table_has_a_row_for_each_arm() -> None:
    result = everything()
    assert len(scores(result, "methods", ARMS)) == 2 + len(ARMS)
    assert all(line.count("|") == len(KINDS) + 2 for line in scores(result, "methods", ARMS))
    assert any("1,234 | 6 | 1.00 | 100" in line for line in sizes(result, ARMS))
    made = page.parts(result, ENVIRONMENT, missing=7)
    assert "7 of its runs are missing" in made["quality-budget"]
    assert all(text.strip() for text in made.values()), made


def test_a_rank_that_was_not_run_is_derived_from_one_that_was() -> None:
    rows = [row for row in everything().rows if (row["task"], row["arm"]) != ("shakespeare", "lora_r1")]
    assert page.smallest_lora(Result(tuple(rows)))[1].endswith(
        f"it would train {1234 // 8} parameters of SmolLM2-135M."
    )
    assert page.smallest_lora(everything()) == []


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_drawn(name: str) -> None:
    figure = PICTURES[name](everything())
    figure.canvas.draw()
    assert any(axes.lines or axes.containers for axes in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("arms", [ARMS, EQUAL_VALUES, RANKS, CHOICES, QUANTISED])
def test_every_arm_of_a_table_has_a_row_of_its_own(arms: dict[str, str]) -> None:
    assert len(set(arms.values())) == len(arms)
    assert len(scores(everything(), "methods", arms)) == 2 + len(arms)


def test_every_arm_of_a_table_is_in_the_grid() -> None:
    assert {*ARMS, *EQUAL_VALUES, *RANKS, *CHOICES, *QUANTISED, *SEEDS} <= set(EVERY_ARM)


def test_every_picture_has_a_required_arm() -> None:
    assert REQUIRED_ARM.keys() >= PICTURES.keys()
    assert set(REQUIRED_ARM.values()) <= set(EVERY_ARM)
