"""Processes that hold different adapters are told so, all of them, before they train together."""

import pytest
import torch.distributed as dist
from peft import get_peft_model
from processes import run
from tiny import LAYERS, MODELS, mlp
from torch import nn

from dvora import DVoRAConfig
from dvora.ranks import check_ranks_agree


def adapted(**settings: object) -> nn.Module:
    return get_peft_model(MODELS["mlp"](), DVoRAConfig(**{"r": 4, "target_modules": LAYERS["mlp"], **settings}))


def answer(by_rank: list[dict[str, object]]) -> str:
    """What the check says on this rank, whose adapter has the settings of its place."""
    try:
        check_ranks_agree(adapted(**by_rank[dist.get_rank()]))
    except ValueError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "agreed"),
        ({"projection_seed": 7}, "projections=kaiming_uniform/"),
        ({"projection_init": "structured"}, "projections=structured/"),
        ({"r": 5}, "rank=5"),
        ({"alpha": 9}, "alpha=9"),
        ({"target_modules": ["lin0"]}, "no adapter on rank 1"),
    ],
    ids=["the same", "seed", "distribution", "rank", "alpha", "layers"],
)
def test_every_rank_hears_of_a_difference(other: dict[str, object], message: str) -> None:
    answers = run(answer, 2, [{}, other])
    assert answers[0] == answers[1]
    assert message in answers[0]


def test_one_process_agrees_with_itself() -> None:
    check_ranks_agree(adapted())


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no DVoRA adapters to compare between ranks: adapt it first"):
        check_ranks_agree(mlp())
