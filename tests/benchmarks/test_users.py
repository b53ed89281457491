"""Many small users: which rates are tried, that parts do not overlap, and that a bank trains as one by one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from peft import get_peft_model

from benchmarks.quality.results import read_rows
from benchmarks.users import training
from benchmarks.users.__main__ import Rows, best_rate, keep, next_rate
from benchmarks.users.sources import ROWS, SOURCES, TOKENS, languages, speakers
from benchmarks.users.tables import LABELS, lower, picture, users
from benchmarks.users.training import ARMS, BATCH, LAYERS, base, run
from examples.top_layers import TopLayers


@pytest.fixture(scope="module")
def top() -> TopLayers:
    two = speakers(2)
    return TopLayers.of({name: two.parts[name] for name in ("train", "development")}, LAYERS)


def tried(best: float) -> list[float]:
    """The rates of all trials where the loss is lowest at one."""
    rows: Rows = {}
    while (rate := next_rate(rows, "speakers", "lora_r1", 8)) is not None:
        loss = abs(torch.log(torch.tensor(rate / best)).item())
        row = {"source": "speakers", "arm": "lora_r1", "examples": 8, "part": "development"}
        rows[f"{rate}"] = {**row, "rate": rate, "losses": [loss, loss]}
        assert (best_rate(rows, "speakers", "lora_r1", 8) is None) == (len(rows) < 4)
    return [row["rate"] for row in rows.values()]


def test_every_arm_gets_three_rates_and_one_more() -> None:
    low, middle, high = ARMS["lora_r1"].rates
    assert tried(1e-6) == [low, middle, high, pytest.approx(low / 3)]
    assert tried(1.0) == [low, middle, high, pytest.approx(high * 3)]
    assert tried(middle * 1.2) == [low, middle, high, pytest.approx(middle * 3**0.5)]
    assert tried(middle / 1.2) == [low, middle, high, pytest.approx(middle / 3**0.5)]
    assert len({len(arm.rates) for arm in ARMS.values()}) == 1


def test_no_row_is_in_two_parts_or_of_two_users() -> None:
    three = languages(3)
    assert {name: tuple(rows.shape) for name, rows in three.parts.items()} == {
        name: (3, count, TOKENS) for name, count in ROWS.items()
    }
    every = [tuple(row.tolist()) for rows in three.parts.values() for row in rows.flatten(0, 1)]
    assert len(set(every)) == len(every)


def test_an_adapter_for_each_lowers_its_loss_and_leaves_the_model_as_it_was(top: TopLayers) -> None:
    before = base(top, "development")
    for arm in ("structured_r64", "lora_r1"):
        outcome = run(top, arm, ARMS[arm].rates[1], BATCH, 0, "development")
        assert all(after < start for after, start in zip(outcome.losses, before, strict=True))
        assert 0 < outcome.sizes["smallest_bytes"] < outcome.sizes["saved_bytes"]
        assert base(top, "development") == before


def test_side_by_side_is_as_one_by_one(top: TopLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(top, "structured_r64", 0.03, BATCH, 0, "development")
    monkeypatch.setattr(training, "TOGETHER", 1)
    alone = run(top, "structured_r64", 0.03, BATCH, 0, "development")
    # The base is in bfloat16, in which another size of a batch rounds otherwise.
    assert together.losses == pytest.approx(alone.losses, abs=2e-2)


def test_the_magnitude_alone_saves_the_magnitude_alone(top: TopLayers) -> None:
    config = ARMS["magnitude"].config(0)
    adapted = get_peft_model(top.model, config)
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    adapted.unload()
    assert trained
    assert all("dvora_magnitude" in name for name in trained)


def test_rows_are_kept_in_the_file(tmp_path: Path) -> None:
    file, row = tmp_path / "users.json", {"key": "a", "losses": [1.0], "seconds": 1.0}
    rows: dict[str, dict[str, Any]] = {}
    keep(rows, row, file)
    keep(rows, {**row, "key": "b"}, file)
    assert read_rows(file) == rows
    assert rows["a"].items() > row.items()
    assert rows["a"]["machine"].endswith("cores")
    assert read_rows(tmp_path / "none.json") == {}


def made_up(losses: dict[str, list[float]]) -> dict[str, Any]:
    """One seed of each arm on each source, with these losses of the users."""
    rows = [
        {
            "key": f"{source} {arm}",
            **{"source": source, "arm": arm, "examples": 0 if arm == "base" else 8, "seed": 0, "part": "test"},
            **{"losses": each, "seconds": 36.0, "smallest_bytes": 50_000},
        }
        for source in SOURCES
        for arm, each in losses.items()
    ]
    return {"environment": {"torch": "2", "peft": "0"}, "rows": rows}


def test_the_table_says_how_much_lower_a_loss_is() -> None:
    losses = {"base": [4.0, 5.0, 4.5], **{arm: [3.8, 4.8, 4.6] for arm in LABELS}, "lora_r8": [3.5, 4.5, 4.3]}
    content = made_up(losses)
    found = lower(content["rows"], "speakers", 8, "lora_r8", "lora_r1")
    assert found is not None
    assert found.mean == pytest.approx(0.3)
    text = users(content)
    assert (
        "| programming languages, 8 | LoRA r=8 | 50 | +0.400 (-0.030 to +0.830) | +0.300 (+0.300 to +0.300) | 0 |"
        in text
    )
    assert "| programming languages, 8 | LoRA r=1 | 50 | +0.100 (-0.330 to +0.530) |  | 1 |" in text
    assert text.count("\n| ") == len(SOURCES) * len(LABELS)
    assert LABELS.keys() == ARMS.keys()


def test_the_picture_has_a_panel_for_each_source() -> None:
    generator = torch.Generator().manual_seed(0)
    figure = picture(made_up({arm: torch.rand(3, generator=generator).tolist() for arm in ("base", *LABELS)}))
    figure.canvas.draw()
    assert len(figure.axes) == len(SOURCES)
    plt.close(figure)
