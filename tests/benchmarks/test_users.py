"""Many small users: which rates are tried, that parts do not overlap, and that a bank trains as one by one does."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.users import training
from benchmarks.users.jobs import RATES, Job, waiting
from benchmarks.users.sources import ROWS, TOKENS, languages
from benchmarks.users.training import ARMS, BATCH, carry_out

JOB = Job("speakers", "structured_r64", 0.03, BATCH, 0, "development")


@pytest.fixture(autouse=True)
def two_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERS", "TUNED_ON"):
        monkeypatch.setattr(training, name, 2)


def tried(best: float) -> list[float]:
    """The rates of all trials where the loss is lowest at one."""
    rows: dict[str, Any] = {}
    while jobs := [job for job in waiting(rows, ["speakers"], [8], ["lora_r1"]) if job.key not in rows]:
        assert ("test" in {job.part for job in jobs if job.arm != "base"}) == (len(rows) > 4)
        for job in jobs:
            loss = abs(torch.log(torch.tensor(max(job.rate, 1e-12) / best)).item())
            rows[job.key] = {**vars(job), "losses": [loss, loss]}
    return [row["rate"] for row in rows.values() if row["part"] == "development"]


def test_every_arm_gets_three_rates_and_one_more() -> None:
    low, middle, high = RATES["lora_r1"]
    assert tried(1e-6) == [low, middle, high, pytest.approx(low / 3)]
    assert tried(1.0) == [low, middle, high, pytest.approx(high * 3)]
    assert tried(middle * 1.2) == [low, middle, high, pytest.approx(middle * 3**0.5)]
    assert RATES.keys() == ARMS.keys()


def test_no_row_is_in_two_parts_or_of_two_users() -> None:
    three = languages(3)
    assert {name: tuple(rows.shape) for name, rows in three.parts.items()} == {
        name: (3, count, TOKENS) for name, count in ROWS.items()
    }
    every = [tuple(row.tolist()) for rows in three.parts.values() for row in rows.flatten(0, 1)]
    assert len(set(every)) == len(every)


def test_an_adapter_for_each_lowers_its_loss_and_leaves_the_model_as_it_was() -> None:
    base = carry_out(replace(JOB, arm="base"))["losses"]
    for arm in ("structured_r64", "magnitude", "lora_r1"):
        row = carry_out(replace(JOB, arm=arm, rate=RATES[arm][1]))
        assert all(after < before for after, before in zip(row["losses"], base, strict=True)), arm
        assert 0 < row["smallest_bytes"] < row["saved_bytes"]
    assert carry_out(replace(JOB, arm="base"))["losses"] == base


def test_side_by_side_is_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = carry_out(JOB)["losses"]
    monkeypatch.setattr(training, "TOGETHER", 1)
    # The base is in bfloat16, in which another size of a batch rounds otherwise.
    assert together == pytest.approx(carry_out(JOB)["losses"], abs=2e-2)
