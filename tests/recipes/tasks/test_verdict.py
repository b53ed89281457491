"""The verdict: never a number alone where something simpler did as well, and then what to try."""

from typing import Any

import pytest

from dvora.recipes.tasks.verdict import beats_head_alone, verdict

ROWS = {"train": 800, "validation": 100, "test": 400}


def metrics(trained: float, head: float, guess: float) -> dict[str, dict[str, Any]]:
    return {
        "test": {"loss": 1.0, "accuracy": trained},
        "test_head_alone": {"accuracy": head},
        "test_simplest_guess": {"guess": "good", "accuracy": guess},
    }


def run(losses: list[float], best_step: int = 10) -> dict[str, Any]:
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    return {"history": history, "steps": len(losses), "best_step": best_step, "settings": {"learning_rate": 0.03}}


def test_a_success_is_compared_with_the_best_baseline() -> None:
    assert verdict(metrics(0.92, 0.87, 0.5), ROWS, run([1.0] * 20)) == [
        "Better than the head alone by 5.0 points (test accuracy: 0.92 trained, 0.87 the head alone)"
    ]


def test_a_gain_within_chance_is_said_to_be() -> None:
    (head,) = verdict(metrics(0.88, 0.87, 0.5), ROWS, run([1.0] * 20))
    assert "by 1.0 points, which 400 rows cannot tell from chance" in head


@pytest.mark.parametrize("trained", [0.5, 0.4])
def test_a_result_of_the_commonest_class_is_no_result(trained: float) -> None:
    head, guess, advice = verdict(metrics(trained, 0.87, 0.5), ROWS, run([1.0] * 20))
    assert guess.startswith("NO BETTER than always good")
    assert head.startswith("NO BETTER than the head alone")
    assert advice


@pytest.mark.parametrize(
    ("losses", "best_step", "advice"),
    [
        ([2.0, 1.8, 1.6, 1.4, 1.2], 3, "Train longer, such as --max-steps 10"),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 5, "Train longer"),
        (
            [2.0, 1.0, 1.0, 1.0, 1.0],
            3,
            "stood still at the end (1 to 1): try other rates, --learning-rate 0.09 and 0.01",
        ),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1, "rose (1 to 5): try a lower rate, --learning-rate 0.01"),
        ([1.0, 2.0, 3.0, 4.0, float("nan")], 1, "try a lower rate"),
    ],
)
def test_what_to_try_follows_from_the_training_loss(losses: list[float], best_step: int, advice: str) -> None:
    assert advice in verdict(metrics(0.5, 0.87, 0.3), ROWS, run(losses, best_step))[-1]


def test_of_numbers_less_is_better() -> None:
    found = {"test": {"loss": 1.0, "pearson": 0.5, "rmse": 0.9}, "test_head_alone": {"pearson": 0.4, "rmse": 0.8}}
    assert verdict(found, ROWS) == ["NO BETTER than the head alone (test rmse: 0.9 trained, 0.8 the head alone)"]


def test_the_head_alone_is_saved_where_the_verdict_is_that_it_is_as_good() -> None:
    assert beats_head_alone(metrics(0.88, 0.87, 0.5))
    assert not beats_head_alone(metrics(0.87, 0.87, 0.5))
    # The test rows decide where there are any.
    assert beats_head_alone({"validation": {"rmse": 2.0}, "validation_head_alone": {"rmse": 1.0}, **metrics(1, 0, 0)})
    assert not beats_head_alone({"validation": {"rmse": 2.0}, "validation_head_alone": {"rmse": 1.0}})
    assert beats_head_alone({"test": {"loss": 1.0}, "test_before_training": {"loss": 0.5}})
    assert beats_head_alone({})


def test_without_held_out_rows_there_is_no_verdict() -> None:
    assert verdict({}, {"train": 10}) == []
