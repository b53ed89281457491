"""The verdict: never a number alone where something simpler did as well, how sure it is, and then what to try."""

from typing import Any

import numpy as np
import pytest

from dvora.recipes.tasks.comparison import comparisons
from dvora.recipes.tasks.verdict import head_saved, verdict


def metrics(part: str, *accuracies: float) -> dict[str, dict[str, Any]]:
    """Of what was trained, of the head alone, of the simplest guess."""
    trained, head, guess = accuracies
    return {
        part: {"loss": 1.0, "accuracy": trained},
        f"{part}_head_alone": {"accuracy": head},
        f"{part}_simplest_guess": {"guess": "good", "accuracy": guess},
    }


def compared(found: dict[str, dict[str, Any]], rows: int = 400) -> dict[str, Any]:
    """Comparisons with these metrics: rows that one model has right, the other has too."""
    right = {key: np.arange(rows) < round(values["accuracy"] * rows) for key, values in found.items()}
    return comparisons("accuracy", {key: np.stack([of, np.ones(rows)], 1).astype(float) for key, of in right.items()})


def run(losses: list[float], best_step: int = 10) -> dict[str, Any]:
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    return {"history": history, "steps": len(losses), "best_step": best_step, "settings": {"learning_rate": 0.03}}


def sentences(*accuracies: float, rows: int = 400) -> list[str]:
    found = metrics("test", *accuracies)
    return verdict(found, compared(found, rows))


def test_a_success_is_compared_with_the_best_baseline() -> None:
    assert sentences(0.92, 0.87, 0.5) == [
        "Better than the head alone by 5.0 points, 95% interval +2.7 to +7.2 (test accuracy of 400 rows: 0.92 trained, "
        "0.87 the head alone)"
    ]


def test_what_rows_cannot_tell_is_said_to_be() -> None:
    assert sentences(10 / 14, 7 / 14, 7 / 14, rows=14)[0] == (
        "CANNOT TELL from the head alone: +21.4 points, 95% interval -7.1 to +44.6; about 42 rows would be needed "
        "(test accuracy of 14 rows: 0.7143 trained, 0.5 the head alone)"
    )
    (one, _) = sentences(1.0, 0.0, 0.0, rows=1)
    assert one.startswith("CANNOT TELL from the head alone: +100.0 points")
    assert "of 1 row:" in one


@pytest.mark.parametrize("trained", [0.5, 0.4])
def test_a_result_of_the_commonest_class_is_no_result(trained: float) -> None:
    head, guess = sentences(trained, 0.87, 0.5, rows=800)
    assert guess.startswith("NO BETTER than always good")
    assert head.startswith("NO BETTER than the head alone: -")


@pytest.mark.parametrize(
    ("losses", "best_step", "advice"),
    [
        ([2.0, 1.8, 1.6, 1.4, 1.2], 5, "Train longer, such as --max-steps 10"),
        (
            [2.0, 1.8, 1.6, 1.4, 1.2],
            3,
            "Validation was best at step 3 of 5 while the training loss fell on (1.4 to 1.2)",
        ),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 5, "Train longer"),
        (
            [2.0, 1.0, 1.0, 1.0, 1.0],
            3,
            "stood still at the end (1 to 1): try other rates, --learning-rate 0.09 and 0.01",
        ),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1, "rose (1 to 5): try a lower rate, --learning-rate 0.01"),
        ([1.0, 2.0, 3.0, 4.0, float("nan")], 1, "try a lower rate"),
        ([2.0, 0.01, 0.01, 0.01, 0.01], 3, "near zero (0.01), so neither rates nor steps are what is missing"),
    ],
)
@pytest.mark.parametrize("labels", [[], ["bad", "good"]])
def test_what_to_try_follows_from_the_training_loss(
    losses: list[float], best_step: int, advice: str, labels: list[str]
) -> None:
    found = metrics("validation", 0.5, 0.87, 0.3)
    assert advice in verdict(found, compared(found), {**run(losses, best_step), "labels": labels})[-1]


def test_advice_follows_from_validation_rows_and_never_from_test_rows() -> None:
    fine, bad = metrics("validation", 0.9, 0.5, 0.5), metrics("test", 0.4, 0.8, 0.5)
    (head, guess) = verdict({**fine, **bad}, compared({**fine, **bad}), run([1.0] * 20))
    assert head.startswith("NO BETTER")
    assert guess.startswith("NO BETTER")
    turned = {**metrics("validation", 0.4, 0.8, 0.5), **metrics("test", 0.9, 0.5, 0.5)}
    better, advice = verdict(turned, compared(turned), run([1.0] * 20))
    assert better.startswith("Better than the head alone")
    assert "try other rates" in advice
    perfect = metrics("validation", 1.0, 1.0, 0.5)
    assert not any("try other rates" in sentence for sentence in verdict(perfect, compared(perfect), run([1.0] * 20)))


def test_of_numbers_less_is_better() -> None:
    found = {"test": {"loss": 1.0, "pearson": 0.5, "rmse": 0.9}, "test_head_alone": {"pearson": 0.4, "rmse": 0.8}}
    by = {"test_head_alone": {"gain": -0.1, "low": -0.2, "high": -0.05, "rows": 40, "outcome": "no better"}}
    assert verdict(found, by) == [
        "NO BETTER than the head alone: -0.1, 95% interval -0.2 to -0.05 (test rmse of 40 rows: 0.9 trained, 0.8 the "
        "head alone)"
    ]
    no_interval = dict.fromkeys(("low", "high", "needed"))
    by = {"test_head_alone": {"gain": 0.1, "rows": 1, "outcome": "cannot tell", **no_interval}}
    assert verdict(found, by)[0].startswith("CANNOT TELL from the head alone: +0.1 (test rmse of 1 row: ")


def test_why_the_head_is_saved() -> None:
    found = metrics("validation", 0.8, 0.85, 0.5)
    assert "as validation rows preferred it (accuracy 0.85, 0.8 trained); --if-no-better adapter" in head_saved(found)
    assert "(accuracy 0.8, 0.8 trained, by its loss)" in head_saved(metrics("validation", 0.8, 0.8, 0.5))


def test_without_held_out_rows_there_is_no_verdict() -> None:
    assert verdict({}, {}) == []
