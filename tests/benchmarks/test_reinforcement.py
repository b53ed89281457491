"""GRPO runs: right answers are rewarded, no question is in two splits, and the plan is the same for all."""

import re
from typing import Any

import pytest
from matplotlib import pyplot as plt

from benchmarks.reinforcement.arms import ARMS, BASE, RATES
from benchmarks.reinforcement.plan import SEEDS, STEPS, Plan, chosen, missing, trials
from benchmarks.reinforcement.problems import PROBLEMS, reward
from benchmarks.reinforcement.tables import LABELS, SMOOTHED, picture, reinforcement, said


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
    base, *waiting = list(missing(rows, ["sums"], ["lora_r1"]))
    assert (base.arm, base.steps) == (BASE, 0)
    assert [plan.seed for plan in waiting] == list(SEEDS)


def test_a_run_that_fails_is_a_row_and_its_rate_is_not_taken() -> None:
    pytest.importorskip("trl", reason="GRPO needs trl, which the extra `bench` installs")
    from benchmarks.reinforcement.training import carry_out

    row = carry_out(Plan("differences", "lora_r1", 0.001, 0, 1, "validation"))
    assert said(row) == "KeyError: 'differences'"
    first, *others = trials("sums", "lora_r1")
    rows = {first.key: {**vars(first), **row, "rate": first.rate}}
    rows |= {each.key: {**vars(each), "solved": [1]} for each in others}
    best = chosen(rows, "sums", "lora_r1", 0)
    assert best is not None
    assert best.rate == others[0].rate


def evaluated(counts: dict[str, list[int]], problems: tuple[str, ...] = ("sums", "dates")) -> list[dict[str, Any]]:
    """The base, which solves ten of a hundred, and a run a seed of each arm, which solves so many."""
    rows: list[dict[str, Any]] = []
    for problem in problems:
        rows.append({"problem": problem, "arm": BASE, "part": "test", "seed": 0, "solved": answers(10), "seconds": 0.0})
        for arm, each in counts.items():
            for seed, count in enumerate(each):
                row = {"problem": problem, "arm": arm, "part": "test", "seed": seed, "solved": answers(count)}
                rows.append(row | {"rewards": [0.1, 0.2] * SMOOTHED, "smallest_bytes": 90_000, "seconds": 36.0})
    return rows


def answers(count: int) -> list[int]:
    return [1] * count + [0] * (100 - count)


@pytest.mark.parametrize(
    ("count", "verdict"), [(60, "within a point of"), (20, "**it is not within"), (40, "or above")]
)
def test_the_table_says_whether_dvora_is_within_a_point(count: int, verdict: str) -> None:
    rows = evaluated({"lora_r1": [40, 40, 40], "structured_r64": [count] * 3})
    text = reinforcement({"environment": {"torch": "2", "peft": "0"}, "rows": rows})
    assert verdict in text
    assert f"| DVoRA r=64, structured | 90 | {count}.0 | {count - 40:+.1f}" in text
    assert "| base |  | 10.0 |  | 10.0 |  |" in text


def test_nothing_is_decided_where_the_interval_is_on_both_sides() -> None:
    rows = evaluated({"lora_r1": [30, 50, 40], "structured_r64": [50, 30, 36]})
    text = reinforcement({"environment": {"torch": "2", "peft": "0"}, "rows": rows})
    assert "do not decide" in text
    assert "DVoRA r=256, dense" not in text


def test_an_arm_that_one_problem_lacks_has_its_row_for_the_other() -> None:
    rows = evaluated({"lora_r1": [40], "dora_r8": [50], "dvora_r256": [45]}, ("sums",))
    rows += evaluated({"lora_r1": [40], "vera_r256": [30]}, ("dates",))
    text = reinforcement({"environment": {"torch": "2", "peft": "0"}, "rows": rows})
    assert re.search(r"^\| DoRA r=8 \| 90 \| 50\.0 \| \+10\.0: .* \|  \|  \|$", text, flags=re.MULTILINE)
    assert "| VeRA r=256 | 90 |  |  | 30.0 | -10.0" in text
    assert "- DVoRA r=256, dense minus LoRA r=1, sums: +5.0" in text


def test_the_table_of_nothing_says_so() -> None:
    assert "No problem" in reinforcement({"environment": {}, "rows": evaluated({})})


def test_the_picture_has_a_row_for_each_problem() -> None:
    figure = picture(evaluated({arm: [30, 40, 50] for arm in ARMS}))
    figure.canvas.draw()
    assert len(figure.axes) == 4
    assert LABELS.keys() == ARMS.keys()
    plt.close(figure)
