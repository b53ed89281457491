"""GRPO runs: right answers are rewarded, no question is in two splits, and the plan is the same for all."""

from typing import Any

import pytest

from benchmarks.reinforcement.arms import ARMS, RATES
from benchmarks.reinforcement.plan import SEEDS, STEPS, Plan, chosen, every_run, missing, trials
from benchmarks.reinforcement.problems import PROBLEMS, reward


@pytest.mark.parametrize(
    ("completion", "right"),
    [(" 17\n3 + 4", 1), ("17", 1), (" 17.", 0), (" 17 apples", 0), ("\n17", 0), (" 1 7", 0), (" 18\n17", 0)],
)
def test_only_the_answer_in_the_first_line_is_rewarded(completion: str, right: int) -> None:
    assert reward(completion, "17") == right


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_question_is_in_two_splits(name: str) -> None:
    problem = PROBLEMS[name]()
    prompts = [each.prompt for part in (problem.train, problem.validation, problem.test) for each in part]
    assert len(set(prompts)) == len(prompts) == 800
    # The examples in the prompt are no question.
    assert not {each.answer for each in problem.test} & {"1987-03-05"}


def test_answers_are_right() -> None:
    for question in PROBLEMS["sums"]().test:
        left, right = question.prompt.split("\n")[-1].removesuffix(" =").split(" + ")
        assert int(question.answer) == int(left) + int(right)
    date = next(each for each in PROBLEMS["dates"]().test if "February" in each.prompt.split("\n")[-1])
    assert date.answer[5:7] == "02"


def test_every_arm_is_tried_at_as_many_rates() -> None:
    assert RATES.keys() == ARMS.keys()
    assert {len(rates) for rates in RATES.values()} == {3}


def test_the_rate_that_solves_most_on_validation_is_taken() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for place, trial in enumerate(trials("sums", "lora_r1")):
        assert chosen(rows, "sums", "lora_r1", 0) is None
        rows[trial.key] = {**vars(trial), "solved": [1] * (place % 2) + [0]}
    best = RATES["lora_r1"][1]
    assert chosen(rows, "sums", "lora_r1", 2) == Plan("sums", "lora_r1", best, 2, STEPS, "test")
    waiting = list(missing(rows, ["sums"], ["lora_r1"]))
    assert [plan.seed for plan in waiting] == list(SEEDS)
    assert {plan.key for plan in waiting} <= every_run(rows)
