"""What result files say is what pages show: scores and differences of known outcome, tables, pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from benchmarks.pictures import FOLDER, save
from benchmarks.plots import PICTURES
from benchmarks.quality.evaluation import packed
from benchmarks.quality.page import LENGTHS, MAIN, over_time
from benchmarks.quality.summary import Result

ITEMS = 50
LIGHTEST, DARKEST = 0.4, 0.12
"""Luminances between which a colour stands out from a white and from a dark page."""


def final(arm: str, seed: int, right: int, loss: float = 0.5, steps: int = 10) -> dict[str, Any]:
    """A row with so many right answers."""
    row = {"task": "countries", "arm": arm, "stage": "final", "seed": seed, "steps": steps, "test_items": ITEMS}
    scores = {"validation": {"loss": loss, "score": 0.5}, "test": {"loss": 1.0, "score": right / ITEMS}}
    return {**row, **scores, "items": packed(np.arange(ITEMS) < right)}


def result(*rows: dict[str, Any]) -> Result:
    return Result((final("majority", 0, 1, steps=0), *rows))


def test_a_gain_is_on_the_seeds_that_both_have() -> None:
    rows = [final("lora_r1", seed, 30) for seed in range(3)] + [final("structured_r64", seed, 35) for seed in range(2)]
    rows.append(final("lora_r1", 3, 0))
    found = result(*rows).gain(["countries"], "structured_r64", "lora_r1")
    assert found is not None
    assert found.mean == pytest.approx(10)
    assert result(*rows).gain(["countries"], "vera_r256", "lora_r1") is None


@pytest.mark.parametrize(("pair", "mean"), [(("frozen", "lora_r1"), -12), (("lora_r1", "frozen"), 12)])
def test_a_baseline_is_compared_with_every_seed(pair: tuple[str, str], mean: float) -> None:
    rows = [final("lora_r1", seed, 30 + seed) for seed in range(3)] + [final("frozen", 0, 25, steps=0)]
    found = result(*rows).gain(["countries"], *pair)
    assert found is not None
    assert found.mean == pytest.approx(mean)


def test_of_two_rates_the_validation_loss_decides_and_not_the_test() -> None:
    rows = [final("lora_r1_twice", 0, 10, loss=0.5), final("lora_r1_twice_half", 0, 50, loss=0.6)]
    names = ("lora_r1_twice", "lora_r1_twice_half")
    assert result(*rows).lowest_loss("countries", names) == "lora_r1_twice"


def test_a_run_is_as_long_as_its_steps_and_the_time_of_one() -> None:
    rows = [final(arm, 0, 30) for arm in MAIN] + [final("lora_r1_time_500", 0, 34, steps=15)]
    medians = dict.fromkeys(LENGTHS, 1.0) | {"structured_r64": 1.5}
    common = {"task": "countries", "dtype": "bfloat16"}
    paced = [{**common, "arm": arm, "ratio": [median - 0.5, median, 2.0]} for arm, median in medians.items()]
    lines = over_time(result(*rows), paced)
    (short, long), (ours,) = lines["lora_r1"], lines["structured_r64"]
    assert (short.time, long.time, ours.time) == (1, 1.5, 1.5)
    assert (long.steps, long.above.mean) == ((15, 15), pytest.approx(8))
    assert ours.in_time is not None
    assert ours.in_time.mean == pytest.approx(-8)


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_pictures_say_what_is_drawn_from_the_committed_rows(name: str, tmp_path: Path) -> None:
    save(name, PICTURES[name], tmp_path)
    light, dark = ((tmp_path / f"{name}{end}.svg").read_text(encoding="utf-8") for end in ("", "-dark"))
    assert "DVoRA" in light or name == "speakers"
    assert ("#d9dbe2" in light, "#d9dbe2" in dark) == (False, True)
    committed = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    # Not the bytes, which another version of matplotlib would change.
    assert re.findall(r">([^<]+)</text>", light) == re.findall(r">([^<]+)</text>", committed)
    assert plt.get_fignums() == []
