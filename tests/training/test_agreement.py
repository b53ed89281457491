"""Different adapters in the processes of a group raise an error in all of them before training."""

import pytest
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

from dvora import DVoRAConfig
from dvora.training import AdapterSettings, check_ranks_agree
from tests.engines.processes import run
from tests.tuner.tiny import LAYERS, MODELS, mlp


def adapted(**settings: object) -> nn.Module:
    return get_peft_model(MODELS["mlp"](), DVoRAConfig(**{"r": 4, "target_modules": LAYERS["mlp"], **settings}))


OTHERS: list[tuple[dict[str, object] | None, str]] = [
    ({}, "agreed"),
    ({"projection_seed": 7}, "projections=structured/"),
    ({"projection_init": "kaiming_uniform"}, "projections=kaiming_uniform/"),
    ({"r": 5}, "rank=5"),
    ({"alpha": 9}, "alpha=9"),
    ({"target_modules": ["lin0"]}, "no adapter"),
    (None, "no adapter"),
]
"""Settings of the second rank, None for no adapter, and what the check says where the first has none of them."""


def answers() -> list[str]:
    """What the check says on this rank of each of `OTHERS`."""
    return [answer(other if dist.get_rank() else {}) for other, _ in OTHERS]


def answer(settings: dict[str, object] | None) -> str:
    try:
        check_ranks_agree(mlp() if settings is None else adapted(**settings))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_every_rank_hears_of_a_difference() -> None:
    first, second = run(answers, 2)
    assert first == second
    for found, (_, message) in zip(first, OTHERS, strict=True):
        assert message in found


def test_one_process_agrees_with_itself() -> None:
    check_ranks_agree(adapted())


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no DVoRA adapters to compare between ranks: adapt it first"):
        check_ranks_agree(mlp())


@pytest.mark.parametrize(("settings", "message"), OTHERS[1:-1])
def test_a_checkpoint_of_other_adapters_is_refused(settings: dict[str, object], message: str) -> None:
    saved = AdapterSettings(adapted(**settings)).state_dict()
    with pytest.raises(ValueError, match="the checkpoint is of other adapters") as refused:
        AdapterSettings(adapted()).load_state_dict(saved)
    assert message in str(refused.value)


def test_a_checkpoint_of_the_same_adapters_is_taken_with_and_without_wrappers() -> None:
    wrapped = nn.ModuleDict({"module": adapted()})
    AdapterSettings(wrapped).load_state_dict(AdapterSettings(adapted()).state_dict())
