"""A warning for vectors that other code rounds, as TRL's trainers do on a quantised base."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dvora import DVoRAConfig
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits


def adapted(**settings: object) -> nn.Module:
    return get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"], **settings))


def cast_what_is_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """By `parameter.data`, of which a module learns nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_magnitude_is_reported_once(dtype: torch.dtype) -> None:
    model = adapted()
    cast_what_is_trained(model, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        outputs(model)
        outputs(model)
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        f"a DVoRA magnitude is in {dtype}, which rounds it by up to 0.4 % and loses small steps"
    ]


def test_vectors_that_are_frozen_while_a_trainer_is_made_stay_whole() -> None:
    model = adapted(inference_mode=True)
    before = outputs(model)
    cast_what_is_trained(model, torch.bfloat16)
    model.set_adapter("default")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert len(trained) == 3 * 2 * len(LAYERS["llama"])
    assert same_bits(outputs(model), before)
