"""Many small users: which rates are tried, that parts do not overlap, and that a bank trains as one by one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from benchmarks.users import training
from benchmarks.users.__main__ import Rows, best_rate, keep, next_rate, read_rows
from benchmarks.users.sources import ROWS, TOKENS, languages, speakers
from benchmarks.users.training import ARMS, BATCH, LAYERS, base, run
from examples.top_layers import TopLayers


@pytest.fixture(scope="module")
def top() -> TopLayers:
    users = speakers(2)
    return TopLayers.of({name: users.parts[name] for name in ("train", "development")}, LAYERS)


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
    users = languages(3)
    assert {name: tuple(rows.shape) for name, rows in users.parts.items()} == {
        name: (3, count, TOKENS) for name, count in ROWS.items()
    }
    every = [tuple(row.tolist()) for rows in users.parts.values() for row in rows.flatten(0, 1)]
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
    assert read_rows(tmp_path / "none.json") == {}
